"""The summary of a run, computed from its steps one by one."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.train.loggers import JsonLines, MetricsFile
from hecate.train.settings import Settings
from hecate.train.summary import SUMMED, Totals, summarize
from tests.train.configs import config

WINDOW = 5


def step(number: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    values = {name: float(draw.random()) for name in SUMMED}
    return {
        "step": number,
        "loss": float(draw.random()),
        **values,
        "tokens": 64,
        "copies": 3,
        "bytes_copied": 2**40 + 1,
    }


def write(path: Path, steps: int, skipped: int = 0) -> MetricsFile:
    with path.open("w") as file:
        for number in range(1, steps + 1):
            file.write(json.dumps(step(number)) + "\n")
        for number in range(steps + 1, steps + skipped + 1):
            file.write(json.dumps({"step": number, "skipped": "NaN"}) + "\n")
        file.write('{"step": ')  # of a killed process
    return MetricsFile(path)


@pytest.mark.parametrize("steps", [1, WINDOW, WINDOW + 1, 40])
def test_means_leave_out_the_first_steps(tmp_path: Path, steps: int) -> None:
    totals = Totals(write(tmp_path / "metrics.jsonl", steps, skipped=2), WINDOW)
    summary = summarize(totals, Settings.from_config(config()), {"validation_loss": 1.0}, bytes_per_token=1.0)
    taken = [step(number) for number in range(1, steps + 1)]
    steady = taken[WINDOW:] or taken
    assert (totals.taken, totals.skipped) == (steps, 2)
    assert (summary["steps"], summary["skipped_steps"]) == (steps, 2)
    assert summary["train_loss"] == taken[-1]["loss"]
    assert summary["tokens"] == 64 * steps
    assert summary["bytes_copied"] == (2**40 + 1) * steps
    assert summary["seconds"] == pytest.approx(sum(m["seconds"] for m in taken), rel=1e-12)
    assert summary["copies_per_step"] == 3
    for name in ("imbalance_before", "imbalance_after"):
        assert summary[name] == pytest.approx(np.mean([m[name] for m in steady]), rel=1e-12)
    expected = sum(m["tokens"] for m in steady) / sum(m["seconds"] for m in steady)
    assert summary["tokens_per_second"] == pytest.approx(expected, rel=1e-12)


def test_steps_are_counted_without_the_skipped_ones(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", steps=3, skipped=2)
    assert [m["step"] for m in MetricsFile(tmp_path / "metrics.jsonl", taken=True)] == [1, 2, 3]
    assert [m["step"] for m in MetricsFile(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def resume_and_summarize(path: Path) -> None:
    JsonLines(path, first_step=10**9).close()
    Totals(MetricsFile(path), WINDOW)


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    peaks = []
    for steps in (200, 4000):
        write(tmp_path / "metrics.jsonl", steps)
        tracemalloc.start()
        resume_and_summarize(tmp_path / "metrics.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 2**14
