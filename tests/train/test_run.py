"""Whole runs of `python -m hecate.train` on two processes: files, resumption, policies, torchrun, a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.loads.trace import read_trace
from hecate.report.record import LayersFile
from hecate.train.loggers import read_metrics
from tests.faults.jobs import own_environment, write_text
from tests.workers import free_port

STEPS = 12
TINY = (
    "model.d_model=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.max_length=32",
    "validation.sequences=5",
    f"steps={STEPS}",
    "save_interval=8",
    "optimizer.warmup=2",
    "trace=true",
    "report=false",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are started: a text to learn, and `first`, a finished run."""
    root = tmp_path_factory.mktemp("train")
    write_text(root)
    train(root, "name=first", "report=true")
    return root


def command(root: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    start = (sys.executable, *launcher, "-m", "hecate.train", f"data.path={root / 'text'}", *TINY, *overrides)
    return {"args": start, "cwd": root, "env": own_environment(), "text": True}


def train(root: Path, *overrides: str, launcher: tuple[str, ...] = (), expect: int = 0) -> str:
    done = subprocess.run(
        **command(root, *overrides, launcher=launcher), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert (done.returncode == 0) == (expect == 0), done.stdout
    return done.stdout


def losses(root: Path, name: str) -> list[float]:
    return [m["loss"] for m in read_metrics(root / "runs" / name / "metrics.jsonl")]


def summary(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "runs" / name / "summary.json").read_text())


def test_a_run_leaves_its_files_and_nothing_else(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["runs", "text"]
    run = folder / "runs" / "first"
    assert {p.name for p in run.iterdir()} == {
        *(
            "config.yaml",
            "launches.json",
            "metrics.jsonl",
            "summary.json",
            "run.png",
            "report.html",
            "layers.bin",
            "trace.npz",
            "checkpoints",
        ),
    }
    assert (run / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "policy: balanced" in (run / "config.yaml").read_text()


def test_metrics_and_summary_agree_with_each_other_and_the_trace(folder: Path) -> None:
    metrics = read_metrics(folder / "runs" / "first" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    trace = read_trace(folder / "runs" / "first" / "trace.npz")
    recorded = list(LayersFile(folder / "runs" / "first" / "layers.bin"))
    assert [step.step for step in recorded] == list(range(1, STEPS + 1))
    for index, (m, step) in enumerate(zip(metrics, recorded, strict=True)):
        loads = np.stack([step.of_layer(layer) for layer in range(2)])
        assert step.before.sum() == step.after.sum() == loads.sum()
        assert m["imbalance_before"] == pytest.approx(step.imbalance[0].mean())
        assert m["copies"] == len(step.copied)
        assert m["exposed_plan"] > 0
        assert loads.sum(axis=1).tolist() == [2 * 2 * 4 * 32] * 2  # top-k, devices, batch, length
        assert np.array_equal(loads, np.stack([layer[index].sum(axis=0) for layer in trace.layers]))
        assert 1 <= m["imbalance_after"] <= m["imbalance_before"] <= 2
    result = summary(folder, "first")
    steady = metrics[5:]
    for name in ("imbalance_before", "imbalance_after"):
        assert result[name] == pytest.approx(np.mean([m[name] for m in steady]))
    assert result["steps"] == STEPS
    assert result["bytes_copied"] == sum(m["bytes_copied"] for m in metrics)
    assert result["val_bits_per_byte"] == result["val_bits_per_token"]
    memory = result["memory_bytes"]
    assert memory["optimizer"] >= 2 * memory["owned"] > 0


def test_an_unfinished_run_goes_on_with_the_same_bits(folder: Path) -> None:
    expected, before = losses(folder, "first"), summary(folder, "first")
    (folder / "runs" / "first" / "summary.json").unlink()
    damaged = folder / "runs" / "first" / "checkpoints" / "step-00000012" / "hecate.json"
    damaged.write_text(damaged.read_text()[:-1])
    output = train(folder, "name=first")
    assert "step-00000012: file hecate.json is damaged" in output
    assert output.count("it is passed over") == 1
    assert f"step 9/{STEPS}" in output
    assert f"step 8/{STEPS}" not in output
    assert losses(folder, "first") == expected
    assert summary(folder, "first")["val_bits_per_byte"] == before["val_bits_per_byte"]
    memory = ("owned", "optimizer", "gradients")
    assert [summary(folder, "first")["memory_bytes"][k] for k in memory] == [before["memory_bytes"][k] for k in memory]


def test_expert_parallelism_learns_the_same_under_torchrun(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    train(folder, "name=ep", "policy=ep", "save_interval=0", launcher=torchrun)
    assert losses(folder, "ep") == pytest.approx(losses(folder, "first"), rel=1e-4)
    result = summary(folder, "ep")
    assert result["val_bits_per_byte"] == pytest.approx(summary(folder, "first")["val_bits_per_byte"], abs=0.02)
    assert result["imbalance_after"] == result["imbalance_before"]
    assert result["bytes_copied"] == 0


def test_masked_language_model_with_accumulation(folder: Path) -> None:
    overrides = ("model=bert_moe_tiny", "accumulate=2", "steps=3", "save_interval=0", "validation.interval=2")
    train(folder, "name=bert", *overrides)
    metrics = read_metrics(folder / "runs" / "bert" / "metrics.jsonl")
    assert [m["tokens"] for m in metrics] == [2 * 2 * 4 * 32] * 3
    assert ["validation_loss" in m for m in metrics] == [False, True, True]


MINE = """
import torch
from hecate.models import GPTMoE, ModelConfig

def model(width):
    return GPTMoE(ModelConfig(d_model=width, num_layers=2, num_heads=2, max_length=16))

class Ramps:
    def __init__(self, size, start):
        self.size, self.start = size, start
    def __len__(self):
        return self.size
    def __getitem__(self, index):
        tokens = (self.start + index + torch.arange(17)) % 256
        return tokens[:-1], tokens[1:]

def data(size):
    return Ramps(size, 0), Ramps(9, 50)
"""
SECTIONS = {
    "model": "_target_: mine.model\nwidth: 16\n",
    "data": "_target_: mine.data\nsize: 40\n",
    "optimizer": "_target_: torch.optim.SGD\nmomentum: 0.9\nlr: 0.1\n",
    "experiment": "# @package _global_\ndefaults:\n- override /model: mine\n- override /data: mine\n"
    "- override /optimizer: mine\nsequence_length: 16\nvalidation: {sequences: 5}\n",
}


def test_a_users_model_data_and_optimizer_from_a_folder_of_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    for group, text in SECTIONS.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(text)
    start = (sys.executable, "-m", "hecate.train", "--config-dir", "conf", "+experiment=mine", "name=mine")
    said = []
    for words in ("steps=7", "logger=tensorboard"), ("steps=9",), ("steps=9", "optimizer._target_=torch.optim.Adam"):
        done = subprocess.run(
            [*start, *words], cwd=tmp_path, env=own_environment(), capture_output=True, text=True, check=False
        )
        said.append(done.stdout + done.stderr)
    assert "model    mine.model, 27,040 parameters, 14,752 active per token; 2 MoE layers of 8 experts" in said[0]
    assert "data     data._target_='mine.data', 40 items to train, 9 to validate" in said[0]
    assert "resumed from step 7 of 9" in said[1]
    assert "has optimizer._target_='torch.optim.SGD', this command 'torch.optim.Adam'" in said[2]
    metrics = read_metrics(tmp_path / "runs" / "mine" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 10))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert ["validation_loss" in m for m in metrics] == [m["step"] in (7, 9) for m in metrics]
    assert list((tmp_path / "runs" / "mine" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("policy=best",), "error: FSSDPConfig.policy='best': must be one of 'balanced', 'hecate', 'ep'"),
        (("stepz=3",), "error: key 'stepz' does not exist; there are the keys"),
        (("model.top_k=9",), "error: model.top_k=9: must be <= model.num_experts=8"),
        (("model=gpt5",), "gpt_moe_tiny"),
        (("data.path=nowhere", "devices=1"), "data.path='nowhere': does not exist"),
    ],
)
def test_bad_input_is_refused(folder: Path, overrides: tuple[str, ...], message: str) -> None:
    assert message in train(folder, "name=bad", *overrides, expect=1)


@pytest.mark.long
def test_several_nodes_meet_without_slurm(folder: Path) -> None:
    script = str(Path(__file__).parents[2] / "launch" / "multinode.sh")
    start = command(folder, "name=nodes", "save_interval=0")
    start["args"] = (script, *start["args"][3:])
    start["env"] |= {"PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo"}
    start["env"] |= {"NODES": "2", "HEAD": "127.0.0.1", "PORT": str(free_port()), "DEVICES": "1"}
    nodes = [subprocess.Popen(**start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("devices  2 cpu" in text and ", 2 nodes" in text for text in said) == 1
    assert losses(folder, "nodes") == pytest.approx(losses(folder, "first"), rel=1e-4)


def test_devices_must_be_torchruns_world_size(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    output = train(folder, "name=bad", "devices=3", launcher=torchrun, expect=1)
    assert output.count("error: devices=3: must equal torchrun's WORLD_SIZE=2") == 1
    assert "Error executing job" not in output


def test_rank_that_dies_is_named_by_the_other(folder: Path) -> None:
    log = folder / "runs" / "killed" / "metrics.jsonl"
    overrides = ("name=killed", "steps=100000", "save_interval=0", "trace=false", "timeout_seconds=30")
    process = subprocess.Popen(
        **command(folder, *overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        os.kill(rank_process(process.pid, rank=1), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "rank 0: rank 1 is missing" in output
    assert "Traceback" not in output


def rank_process(parent: int, rank: int) -> int:
    """The `rank`-th process that torch.multiprocessing spawned under `parent` (the first child is its tracker)."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    spawned = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return spawned[rank]
