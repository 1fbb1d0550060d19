"""The check on a GPU, dry: its comparisons and its bookkeeping, without a device."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_exact, gpu_layers, gpu_symmetric
from benchmarks.gpu_kernels import Case
from benchmarks.report import Report
from hecate._native import kernel_names
from hecate.ops.kernels import launch
from tests.runtime import reference
from tests.workers import WorkerError

CPU = torch.device("cpu")


def figures(text: str) -> dict[str, float]:
    return {row["subject"]: row["value"] for row in map(json.loads, text.splitlines())}


def test_smoke_runs_every_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    ran, run_kernel = set(), launch.run_kernel
    monkeypatch.setattr(launch, "run_kernel", lambda name, *rest: ran.add(name) or run_kernel(name, *rest))
    gpu_check.smoke(CPU)
    found = figures(capsys.readouterr().out)
    assert set(found.values()) == {1.0}
    assert ran == set(kernel_names())


def test_smoke_names_the_kernel_that_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    values = iter([torch.ones(2), torch.ones(2), torch.ones(2), torch.zeros(2)])
    run: Callable[[], tuple[torch.Tensor]] = lambda: (next(values),)  # noqa: E731
    monkeypatch.setattr(gpu_check, "cases", lambda size, device: [Case("good", run), Case("bad", run)])
    monkeypatch.setattr(gpu_check, "variants", lambda device: [])
    with pytest.raises(SystemExit, match="differ from the CPU: bad"):
        gpu_check.smoke(CPU)
    assert figures(capsys.readouterr().out) == {"good": 1.0, "bad": 0.0}


def test_layers_and_a_model_are_measured(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    gpu_layers.layers(CPU)
    gpu_layers.train(CPU, tmp_path / "trace.json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {(row["subject"], row["metric"]) for row in rows}
    for subject in ("hecate", "hecate, splits on the device", "grouped products alone", "transformers' grouped path"):
        assert {(subject, f"{way} of the product") for way in ("forward", "backward")} <= found
    assert {("hecate", f"host time {way}") for way in ("forward", "backward")} <= found
    waits = {row["subject"]: row["value"] for row in rows if row["metric"] == "waits of the host in a layer"}
    assert waits == {"hecate": 1, "hecate, splits on the device": 0}
    assert ("hecate", "tokens per second") in found
    assert all(row["value"] > 0 for row in rows if not row["metric"].startswith("waits"))
    names = {event.get("name", "") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert any(name.startswith("hecate::experts") for name in names)


def test_virtual_ranks_are_checked_and_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    gpu_symmetric.symmetric_speed(CPU)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = {"spAG by copy engines", "spAG by the kernel", "spRS of torch.bfloat16", "spRS of torch.float32"}
    for metric in ("right", "of the copy", "exposed behind attention"):
        assert {row["subject"] for row in rows if row["metric"] == metric} == names
    assert all(row["value"] == 1 for row in rows if row["metric"] == "right")
    monkeypatch.setattr(gpu_symmetric, "_right", lambda *_: False)
    with pytest.raises(SystemExit, match=r"spRS of torch.bfloat16 is wrong: 4 virtual ranks, 2 slots"):
        gpu_symmetric.symmetric_speed(CPU)


class FakeGroup:
    """In place of processes: bfloat16 over two ranks differs."""

    def __init__(self, ranks: int, **_: object) -> None:
        self.ranks = ranks

    def run(self, function: object, case: reference.Case) -> None:
        if self.ranks == 2 and case.dtype == torch.bfloat16:
            raise WorkerError("--- rank 0\nloss differs")

    def close(self) -> None:
        pass


def test_exactness_goes_on_after_a_setting_that_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_exact, "Group", FakeGroup)
    with pytest.raises(SystemExit, match=r"2 ranks over gloo, torch.bfloat16, Hecate's kernels"):
        gpu_exact.exact(CPU)
    out, err = capsys.readouterr()
    assert sorted(figures(out).values()) == [0.0, *[1.0] * 8]
    assert "loss differs" in err
    with pytest.raises(SystemExit, match=r"2 ranks over gloo, torch.bfloat16, Hecate's kernels, symmetric memory"):
        gpu_exact.exact_symmetric(CPU)
    assert sorted(figures(capsys.readouterr().out).values()) == [0.0, *[1.0] * 3]


@pytest.mark.parametrize("code", [None, 0, 9])
def test_memcheck_runs_where_there_is_one(
    code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho out of bounds in: $*\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None if code is None else str(tool))
    with pytest.raises(SystemExit, match="out of bounds in: --tool memcheck") if code else nullcontext():
        gpu_check.memcheck(torch.device("cuda"))
    assert figures(capsys.readouterr().out) == {"compute-sanitizer memcheck": float(code is not None)}


def test_what_a_step_measured_is_kept_when_it_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    row = {"setting": "s", "subject": "k", "metric": "time", "value": 2.0, "unit": "us"}
    script.write_text(
        f"import sys, time\nprint({json.dumps(row)!r}, flush=True)\n"
        "if sys.argv[2] == 'slow': time.sleep(60)\nsys.exit(sys.argv[2] == 'bad')\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    for name, limit, outcome in (("good", 30, "passed"), ("bad", 30, "failed"), ("slow", 1, "cut after 1 s")):
        report, path = Report(), tmp_path / f"{name}.json"
        assert gpu_check.run_step(name, "cpu", limit, report, path) == outcome
        if name != "slow":  # a slow machine may not come to the first line within the second
            assert json.loads(path.read_text())["rows"] == [row]


def test_without_a_device_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from hecate.ops.kernels import cuda

    cuda.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().out.startswith('nothing was measured: kernels="hecate": torch sees no CUDA device')
    cuda.missing.cache_clear()
