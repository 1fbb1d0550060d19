"""The steps of a run, aggregated to the resolution of a picture, so that memory does not grow with the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_COLUMNS", "MAX_LAYERS", "MAX_POINTS", "Curve", "Curves", "Parts", "read_curves"]

Floats = NDArray[np.float64]

MAX_POINTS = 4000
"""Points per curve, several per pixel. A run with at most this many steps is drawn without aggregation."""
MAX_COLUMNS = 400
"""Columns per heat map."""
MAX_LAYERS = 12
"""Number of heat maps."""
NAMES = (
    "loss",
    "imbalance_before",
    "imbalance_after",
    "imbalance_worst",
    "tokens_per_second",
    "copies",
    "copies_calibrated",
)
"""Metrics that `plot_run` draws."""


@dataclass(frozen=True)
class Curve:
    """A metric over time. A point covers one or more consecutive steps; each array has shape `[points]`.

    Attributes:
        low, high: minimum and maximum over the steps of each point.
        mean: mean over the steps of each point.
    """

    low: Floats
    high: Floats
    mean: Floats


@dataclass(frozen=True)
class Curves:
    """The data that `plot_run` draws.

    Attributes:
        first, last: numbers of the first and the last step.
        steps: `[points]`, mean step number of each point.
        values: a curve for each name; NaN where no step of a point has the metric.
        validation: (step, loss), at most one per point.
        layers: indices of the layers that are shown.
        loads: `[layers shown, experts, columns]`, expert load / mean expert load.
    """

    first: int
    last: int
    steps: Floats
    values: Mapping[str, Curve]
    validation: list[tuple[int, float]]
    layers: list[int]
    loads: Floats


def read_curves(metrics: Iterable[Mapping[str, Any]], names: Sequence[str] = NAMES) -> Curves:
    """Aggregate `metrics`, one mapping per step, see `plot_run`; iterates twice. ValueError if there are no steps."""
    count = sum(1 for _ in metrics)
    points, columns = Parts(count, MAX_POINTS), Parts(count, MAX_COLUMNS)
    sums, low, high = (np.full((len(names) + 1, points.parts), start) for start in (0.0, np.nan, np.nan))
    counted, recorded = np.zeros_like(sums), np.zeros(columns.parts)
    numbers: list[int] = []
    layers: list[int] = []
    loads = np.zeros((0, 0, 0))
    validation: dict[int, tuple[int, float]] = {}
    for index, step in enumerate(metrics):
        point, row = points.of(index), _row(step, names)
        sums[:, point] += np.nan_to_num(row)
        counted[:, point] += ~np.isnan(row)
        low[:, point] = np.fmin(low[:, point], row)
        high[:, point] = np.fmax(high[:, point], row)
        numbers = [*numbers[:1], step["step"]]
        if "validation_loss" in step:
            validation[point] = (step["step"], step["validation_loss"])
        if "loads" not in step:
            continue
        if not layers:
            layers = _shown(len(step["loads"]))
            loads = np.zeros((len(layers), len(step["loads"][0]), columns.parts))
        own = np.array([step["loads"][layer] for layer in layers], dtype=np.float64)
        recorded[columns.of(index)] += 1
        loads[:, :, columns.of(index)] += own / np.maximum(own.mean(axis=1, keepdims=True), 1e-9)
    if not numbers:
        raise ValueError("a run without a step cannot be drawn")
    mean = np.where(counted > 0, sums / np.maximum(counted, 1), np.nan)
    values = {name: Curve(low[i], high[i], mean[i]) for i, name in enumerate(names, start=1)}
    loads = loads / np.maximum(recorded, 1) if layers else loads
    return Curves(numbers[0], numbers[-1], mean[0], values, list(validation.values()), layers, loads)


def _row(step: Mapping[str, Any], names: Sequence[str]) -> Floats:
    """The step's number and metrics; NaN for one that it does not have."""
    values = (step.get(name) for name in names)
    return np.array([step["step"], *(np.nan if value is None else value for value in values)], dtype=np.float64)


def _shown(layers: int) -> list[int]:
    """Indices of at most `MAX_LAYERS` evenly spaced layers."""
    return np.unique(np.linspace(0, layers - 1, min(layers, MAX_LAYERS)).round().astype(int)).tolist()


class Parts:
    """Split of `count` steps into `parts` <= `most` consecutive parts, like `numpy.array_split`; `sizes` `[parts]`."""

    def __init__(self, count: int, most: int) -> None:
        self.parts = max(min(count, most), 1)
        self._size, self._larger = divmod(count, self.parts)
        self.sizes = np.full(self.parts, self._size, dtype=np.float64)
        self.sizes[: self._larger] += 1

    def of(self, index: int) -> int:
        """The part that step `index` is in; the first `_larger` parts have one step more than the rest."""
        boundary = self._larger * (self._size + 1)
        if index < boundary:
            return index // (self._size + 1)
        return self._larger + (index - boundary) // self._size
