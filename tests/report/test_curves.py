"""The plot of a run, made from its steps one by one: what it shows, and that memory does not grow with the run."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.report import curves as module
from hecate.report.curves import read_curves
from hecate.report.run import plot_run

LAYERS, EXPERTS = 14, 5


@dataclass(frozen=True)
class Steps:
    """A run of so many steps that holds none of them."""

    count: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.count):
            draw = np.random.default_rng(index)
            step = {
                "step": index + 1,
                "loss": float(draw.random()),
                "imbalance_before": 1 + float(draw.random()),
                "imbalance_after": 1.0,
                "imbalance_worst": 1 + float(draw.random()),
                "tokens_per_second": 1000 * float(draw.random()),
                "copies": int(draw.integers(5)),
                "copies_calibrated": int(draw.integers(5)),
                "loads": draw.integers(0, 99, (LAYERS, EXPERTS)).tolist(),
            }
            yield step | ({"validation_loss": 2.0 + index} if index % 3 == 2 else {})


@pytest.mark.parametrize("count", [1, 7, 23])
def test_short_run_is_drawn_step_by_step(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(module, "MAX_COLUMNS", 5)
    steps, found = list(Steps(count)), read_curves(Steps(count))
    assert (found.first, found.last) == (1, count)
    assert found.steps.tolist() == [m["step"] for m in steps]
    for name, curve in found.values.items():
        for values in (curve.low, curve.high, curve.mean):
            assert values.tolist() == [m[name] for m in steps]
    assert found.validation == [(m["step"], m["validation_loss"]) for m in steps if "validation_loss" in m]
    assert found.layers == [0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13]
    loads = np.array([m["loads"] for m in steps], dtype=np.float64)[:, found.layers]
    relative = loads / loads.mean(axis=2, keepdims=True)
    parts = np.array_split(relative, min(count, 5))
    assert np.allclose(found.loads, np.stack([part.mean(axis=0) for part in parts], axis=2))


def test_long_run_keeps_extremes_and_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_POINTS", 4)
    found, loss = read_curves(Steps(10)), [m["loss"] for m in Steps(10)]
    parts = np.array_split(loss, 4)
    curve = found.values["loss"]
    assert curve.low.tolist() == [part.min() for part in parts]
    assert curve.high.tolist() == [part.max() for part in parts]
    assert np.allclose(curve.mean, [part.mean() for part in parts])
    assert np.allclose(found.steps, [part.mean() for part in np.array_split(np.arange(1, 11), 4)])
    assert [step for step, _ in found.validation] == [3, 6, 9]


def test_what_was_not_recorded_is_left_out() -> None:
    steps = [{name: value for name, value in m.items() if name not in ("copies", "loads")} for m in Steps(3)]
    steps[1]["tokens_per_second"] = None
    found = read_curves(steps)
    assert np.isnan(found.values["copies"].mean).all()
    assert np.isnan(found.values["tokens_per_second"].mean).tolist() == [False, True, False]
    assert found.layers == []


def test_memory_does_not_grow_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_POINTS", 50)
    monkeypatch.setattr(module, "MAX_COLUMNS", 20)
    read_curves(Steps(1))  # what numpy keeps for ever
    peaks = []
    for count in (100, 2000):
        tracemalloc.start()
        read_curves(Steps(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("points", [1000, 4])
def test_picture_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, points: int) -> None:
    monkeypatch.setattr(module, "MAX_POINTS", points)
    plot_run(Steps(9), tmp_path / "run.png", title="nine steps")
    plot_run(Steps(9), tmp_path / "both.png", title="two runs", other=("other", Steps(20)))
    pictures = [(tmp_path / name).read_bytes() for name in ("run.png", "both.png")]
    assert all(picture[:8] == b"\x89PNG\r\n\x1a\n" for picture in pictures)
    assert pictures[0] != pictures[1]


def test_run_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a step"):
        plot_run(Steps(0), tmp_path / "run.png", title="none")
