"""`benchmarks.end_to_end` and `benchmarks.ablation`: a short run of each, and bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import cluster, end_to_end, scaling
from benchmarks.end_to_end import bars
from benchmarks.report import Report
from benchmarks.systems import MissingError, make_system
from benchmarks.systems.policies import policy_settings
from hecate.cost import CostModel
from tests.faults.jobs import own_environment, write_text

TINY = ("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.max_length=32", "model.num_experts=8")


def benchmark(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    where = Path(__file__).parents[2]
    return subprocess.run(command, cwd=where, env=own_environment(), capture_output=True, text=True, check=False)


def figures(file: Path) -> dict[tuple[str, str, str], float]:
    rows = json.loads(file.read_text())["rows"]
    return {(row["setting"], row["subject"], row["metric"]): row["value"] for row in rows}


def test_systems_side_by_side(tmp_path: Path) -> None:
    text, file = write_text(tmp_path) / "text", tmp_path / "out.json"
    systems = "ep,balanced:calibrate=always,smartmoe:reshard_interval=2,fsdp2,transformers-ep"
    skews = ("--skew", "own", "--skew", "zipf:1.2:beside", "--skew", "none")
    options = ("--json", str(file), "--plots", str(tmp_path / "plots"), "--rounds", "2", "--warm-up", "3")
    done = benchmark("end_to_end", *options, "--systems", systems, *skews, f"data.path={text}", *TINY)
    assert done.returncode == 0, done.stderr
    assert "skipped: transformers-ep: transformers-ep trains models of transformers only" in done.stderr
    assert "percent_of_ceiling" in done.stdout
    found, skewed = figures(file), "2 processes, zipf:1.2:beside"
    named = {subject for _, subject, _ in found}
    assert named == {"ceiling", "cost model", *systems.split(",")} - {"transformers-ep"}
    assert found["2 processes", "cost model", "flops"] == CostModel.cpu().flops
    for setting in ("2 processes, own", skewed, "2 processes, none"):
        assert found[setting, "ceiling", "percent_of_ceiling"] == 100
        assert found[setting, "ep", "over_ep"] == found[setting, "ceiling", "imbalance_after"] == 1
        assert found[setting, "fsdp2", "percent_of_ceiling"] > 0
        assert found[setting, "fsdp2", "cpu_seconds_max"] >= found[setting, "fsdp2", "cpu_seconds_mean"] > 0
    assert found[skewed, "ep", "imbalance_after"] > 1.4
    assert found[skewed, "balanced:calibrate=always", "imbalance_after"] < 1.1
    assert found[skewed, "smartmoe:reshard_interval=2", "imbalance_after"] < found[skewed, "ep", "imbalance_after"]
    assert found["2 processes, none", "ep", "imbalance_after"] == 1
    assert (
        found[skewed, "balanced:calibrate=always", "memory_copies_max"] > found[skewed, "ep", "memory_copies_max"] == 0
    )
    for kind in ("owned", "optimizer", "gradients"):
        same = {found[skewed, name, f"memory_{kind}_mean"] for name in ("ep", "fsdp2")}
        assert max(same) < 1.1 * min(same), kind
    assert found[skewed, "ep", "exposed_all_to_all"] > 0
    assert (skewed, "fsdp2", "exposed_all_to_all") not in found
    pictures = {file.relative_to(tmp_path / "plots").as_posix() for file in (tmp_path / "plots").rglob("*.png")}
    assert pictures == {"percent_of_ceiling.png", *(f"{s}/timeline.png" for s in ("own", "none", "zipf_1.2_beside"))}
    json.loads((tmp_path / "plots" / "none" / "ep.trace.json").read_text())


def test_on_a_cluster_the_result_names_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["end_to_end.py", "--cluster", "--systems", "ep", "--skew", "none", "--json", "out.json", "batch_size=2"]
    commands: list[list[str]] = []
    found: list[str | None] = []
    monkeypatch.setattr(cluster, "emulated", lambda *_: nullcontext())
    monkeypatch.setattr(cluster, "tear_down_on_signals", lambda: None)
    monkeypatch.setattr(cluster, "run", lambda words, ranks: commands.append(words) or 0)
    monkeypatch.setattr(end_to_end, "cost_of", lambda ranks, folder: [f"fssdp.cost={folder}/cost.json"])
    monkeypatch.setattr(end_to_end, "launch", lambda config, run: found.append(run.keywords["options"].command))
    monkeypatch.setattr(sys, "argv", typed)
    assert end_to_end.main() == 0
    ((_, _, *again),) = commands
    monkeypatch.setattr(sys, "argv", again)
    assert end_to_end.main() == 0
    assert found == [" ".join(["python -m benchmarks.end_to_end", *typed[1:]])]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--skew", "best"), "error: skew 'best': must be one of own, none, zipf:EXPONENT"),
        (("--rounds", "0"), "error: --rounds 0 --warm-up 8: must be at least 1 and 0"),
        (("--nodes", "3"), "error: --nodes 3: is of an emulated cluster; needs --cluster"),
    ],
)
def test_bad_options(words: tuple[str, ...], text: str) -> None:
    done = benchmark("end_to_end", *words)
    assert done.returncode == 2
    assert text in done.stderr


def test_systems_that_do_not_exist() -> None:
    nothing: Any = SimpleNamespace()
    with pytest.raises(ValueError, match="system 'best': must be one of fsdp2, transformers-ep, deepspeed-moe"):
        make_system("best", nothing)
    assert policy_settings("hecate:memory_slots=0:calibrate=false:max_imbalance=1.5:pools=layer") == {
        "policy": "hecate",
        "memory_slots": 0,
        "calibrate": False,
        "max_imbalance": 1.5,
        "pools": "layer",
    }


@pytest.mark.parametrize(("model", "name"), [("gpt", "deepspeed-moe"), ("mixtral", "deepspeed-autoep")])
def test_deepspeed_learns_the_same(model: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'hecate-moe[deepspeed]'")
    text, file = write_text(tmp_path) / "text", tmp_path / "out.json"
    options = ("--json", str(file), "--rounds", "3", "--warm-up", "1", "--model", model)
    words = ("--systems", f"ep,{name}", "--skew", "own", "--skew", "zipf:1.2:beside", f"data.path={text}", *TINY)
    done = benchmark("end_to_end", *options, *words)
    assert done.returncode == 0, done.stderr
    if model == "mixtral" and (reason := re.search(f"skipped: {name}: DeepSpeed .* transformers .*", done.stderr)):
        pytest.skip(reason.group())
    found = figures(file)
    for setting in ("2 processes, own", "2 processes, zipf:1.2:beside"):
        assert found[setting, name, "loss"] == pytest.approx(found[setting, "ep", "loss"], abs=1e-6)
        assert found[setting, name, "loss"] != found[setting, "ceiling", "loss"]
        assert found[setting, name, "percent_of_ceiling"] > 0


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("deepspeed-moe", "deepspeed.moe.layer", "gpt"),
        ("deepspeed-autoep", "deepspeed.module_inject.auto_ep", "mixtral"),
    ],
)
def test_systems_that_are_not_installed_are_named(
    name: str, module: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    task: Any = SimpleNamespace(kind=kind)
    with pytest.raises(MissingError, match=f"{module} is not installed: pip install 'hecate-moe\\[deepspeed\\]'"):
        make_system(name, task)


def test_ablations_beside_the_paper(tmp_path: Path) -> None:
    text, file = write_text(tmp_path) / "text", tmp_path / "out.json"
    options = ("--json", str(file), "--rounds", "1", "--warm-up", "3", "--budget", "100000000")
    words = ("--parts", "rematerialize,batch", f"data.path={text}", *TINY, "model.num_layers=3")
    done = benchmark("ablation", *options, *words)
    assert done.returncode == 0, done.stderr
    found = figures(file)
    remat, kept = "balanced:calibrate=always:rematerialize=true", "balanced:calibrate=always"
    title = f"memory_copies of {remat} over {kept}"
    setting = "rematerialize, 2 processes, zipf:1.2"
    assert found[setting, "paper", title] == 0.098
    # Two buffers with room for all slots, over the copies that were planned for three layers: fewer, if loads are even.
    assert found[setting, "here", title] > 0
    batches = {
        name: found["batch, 2 processes, zipf:1.2, 100000000 bytes", name, "largest_batch"] for name in (kept, remat)
    }
    assert min(batches.values()) > 0


def test_batches_of_strong_scaling_divide_the_sequences_of_the_largest_size() -> None:
    assert [scaling.batch_of("strong", size, 16, 2) for size in (1, 4, 8, 16)] == [32, 8, 4, 2]
    assert [scaling.batch_of("weak", size, 16, 2) for size in (1, 4, 8, 16)] == [2, 2, 2, 2]
    for size in (0, 6):
        with pytest.raises(ValueError, match=f"--sizes {size}: must be at least 1, and at most 4 or a multiple of it"):
            scaling.batch_of("weak", size, 16, 2)
    with pytest.raises(ValueError, match="--sizes 3: must divide the 32 sequences of strong scaling"):
        scaling.batch_of("strong", 3, 16, 2)
    with pytest.raises(ValueError, match="--kinds even: must be of weak, strong"):
        scaling.batch_of("even", 4, 16, 2)


def test_efficiency_is_over_the_smallest_size(tmp_path: Path) -> None:
    report = Report()
    for size, speed in ((1, 100.0), (4, 300.0)):
        report.add(f"weak, {size} devices", "ep", "tokens_per_second", speed, "1/s")
    scaling.add_efficiency(report, ["weak"], [1, 4])
    assert [(r.setting, r.value) for r in report.rows if r.metric == "efficiency"] == [
        ("weak, 1 devices", 1.0),
        ("weak, 4 devices", 0.75),
    ]
    bars(report, "efficiency", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
