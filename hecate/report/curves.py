"""The steps of a run drawn together to what a picture can show, so that memory does not grow with the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_COLUMNS", "MAX_LAYERS", "MAX_POINTS", "Curve", "Curves", "read_curves"]

Floats = NDArray[np.float64]

MAX_POINTS = 4000
"""Of a curve: several for each pixel. A run of no more steps is drawn step by step."""
MAX_COLUMNS = 400
"""Of a heat map."""
MAX_LAYERS = 12
"""Heat maps."""
NAMES = ("loss", "imbalance_before", "imbalance_after")


@dataclass(frozen=True)
class Curve:
    """A number over time; `[points]` each.

    Attributes:
        low, high: the least and the most among the steps of a point.
        mean: theirs.
    """

    low: Floats
    high: Floats
    mean: Floats


@dataclass(frozen=True)
class Curves:
    """What `plot_run` draws.

    Attributes:
        first, last: step numbers.
        steps: `[points]`, the mean step number of each.
        values: a curve for each of `NAMES`.
        validation: (step, loss), at most one a point.
        layers: numbers of the layers that are shown.
        loads: `[layers shown, experts, columns]`, expert load / mean expert load.
    """

    first: int
    last: int
    steps: Floats
    values: Mapping[str, Curve]
    validation: list[tuple[int, float]]
    layers: list[int]
    loads: Floats


def read_curves(metrics: Iterable[Mapping[str, Any]]) -> Curves:
    """Go through `metrics` twice; one mapping a step, see `plot_run`. ValueError if there is none."""
    count = sum(1 for _ in metrics)
    points, columns = _Parts(count, MAX_POINTS), _Parts(count, MAX_COLUMNS)
    sums, low, high = (np.full((len(NAMES) + 1, points.parts), start) for start in (0.0, np.inf, -np.inf))
    numbers: list[int] = []
    layers: list[int] = []
    loads = np.zeros((0, 0, 0))
    validation: dict[int, tuple[int, float]] = {}
    for index, step in enumerate(metrics):
        point, row = points.of(index), np.array([step["step"], *(step[name] for name in NAMES)], dtype=np.float64)
        sums[:, point] += row
        low[:, point] = np.fmin(low[:, point], row)
        high[:, point] = np.fmax(high[:, point], row)
        numbers = [*numbers[:1], step["step"]]
        if "validation_loss" in step:
            validation[point] = (step["step"], step["validation_loss"])
        if not layers:
            layers = _shown(len(step["loads"]))
            loads = np.zeros((len(layers), len(step["loads"][0]), columns.parts))
        own = np.array([step["loads"][layer] for layer in layers], dtype=np.float64)
        loads[:, :, columns.of(index)] += own / np.maximum(own.mean(axis=1, keepdims=True), 1e-9)
    if not numbers:
        raise ValueError("a run without a step cannot be drawn")
    mean = sums / points.sizes
    values = {name: Curve(low[i], high[i], mean[i]) for i, name in enumerate(NAMES, start=1)}
    return Curves(numbers[0], numbers[-1], mean[0], values, list(validation.values()), layers, loads / columns.sizes)


def _shown(layers: int) -> list[int]:
    """Evenly spaced ones of so many."""
    return np.unique(np.linspace(0, layers - 1, min(layers, MAX_LAYERS)).round().astype(int)).tolist()


class _Parts:
    """`count` steps in `parts` <= `most` consecutive parts, as `numpy.array_split` cuts them; `sizes` `[parts]`."""

    def __init__(self, count: int, most: int) -> None:
        self.parts = max(min(count, most), 1)
        self._size, self._larger = divmod(count, self.parts)
        self.sizes = np.full(self.parts, self._size, dtype=np.float64)
        self.sizes[: self._larger] += 1

    def of(self, index: int) -> int:
        """The part of a step; the first `_larger` parts have one step more."""
        boundary = self._larger * (self._size + 1)
        if index < boundary:
            return index // (self._size + 1)
        return self._larger + (index - boundary) // self._size
