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
from hecate.train.loggers import read_metrics
from tests.faults.jobs import own_environment, write_text

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
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are started: a text to learn, and `first`, a finished run."""
    root = tmp_path_factory.mktemp("train")
    write_text(root)
    train(root, "name=first")
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
        *("config.yaml", "launches.json", "metrics.jsonl", "summary.json", "run.png", "trace.npz", "checkpoints"),
    }
    assert (run / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "policy: balanced" in (run / "config.yaml").read_text()


def test_metrics_and_summary_agree_with_each_other_and_the_trace(folder: Path) -> None:
    metrics = read_metrics(folder / "runs" / "first" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    trace = read_trace(folder / "runs" / "first" / "trace.npz")
    for index, m in enumerate(metrics):
        loads = np.array(m["loads"])
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
    assert ["validation_loss" in m for m in metrics] == [False, True, False]


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


def test_devices_must_be_torchruns_world_size(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=1")
    output = train(folder, "name=bad", "devices=2", launcher=torchrun, expect=1)
    assert "devices=2: must equal torchrun's WORLD_SIZE=1" in output


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


def rank_process(parent: int, rank: int) -> int:
    """The `rank`-th process that torch.multiprocessing spawned under `parent` (the first child is its tracker)."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    spawned = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return spawned[rank]
