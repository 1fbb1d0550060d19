"""The check on a GPU, dry: its comparisons and its bookkeeping, without a device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_kernels import Case
from benchmarks.report import Report

CPU = torch.device("cpu")


def figures(text: str) -> dict[str, float]:
    return {row["subject"]: row["value"] for row in map(json.loads, text.splitlines())}


def test_smoke_runs_every_kernel_once(capsys: pytest.CaptureFixture) -> None:
    gpu_check.smoke(CPU)
    found = figures(capsys.readouterr().out)
    assert len(found) == 13
    assert set(found.values()) == {1.0}


def test_smoke_names_the_kernel_that_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    values = iter([torch.ones(2), torch.ones(2), torch.ones(2), torch.zeros(2)])
    run: Callable[[], tuple[torch.Tensor]] = lambda: (next(values),)  # noqa: E731
    monkeypatch.setattr(gpu_check, "cases", lambda size, device: [Case("good", run), Case("bad", run)])
    with pytest.raises(SystemExit, match="differ from the CPU: bad"):
        gpu_check.smoke(CPU)
    assert figures(capsys.readouterr().out) == {"good": 1.0, "bad": 0.0}


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
