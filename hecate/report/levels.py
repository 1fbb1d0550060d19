"""The layers of a run, aggregated in levels that a page can hold: all steps coarsely, some steps exactly.

- Run: the largest imbalance of each layer in each column of steps; of at most `RUN_CELLS` (layer, column) pairs.
- Layer: mean loads of experts and devices in each column of steps; of at most `LAYER_CELLS` values in all layers.
- Step: everything of one step per column, the one in which the largest imbalance is left; `STEP_CELLS` values in all.

Memory depends on these numbers, not on the length of the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecate.report.curves import Parts
from hecate.report.record import DESCRIPTION, LayersFile, RecordedStep, Shape

__all__ = ["BINS", "Levels", "read_levels"]

RUN_CELLS = 1_200_000
LAYER_CELLS = 5_000_000
STEP_CELLS = 2_200_000
BINS = np.concatenate([np.linspace(1.0, 3.0, 81), [np.inf]])
"""Edges of the histogram of imbalances."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Levels:
    """The aggregated layers; L layers, D devices, E experts of all layers together.

    Attributes:
        shape: layers and devices.
        first, last, count: numbers of the first and the last step, and how many were recorded.
        run_steps, layer_steps: int `[columns]`, the first step of each column.
        imbalance: float32 `[2, L, run columns]`, largest without and with copies.
        histogram: int `[2, len(BINS) - 1]`, how many (layer, step) pairs have such an imbalance.
        loads: float32 `[E, layer columns]`, load of an expert / mean load of its layer's experts.
        devices: float32 `[2, L, D, layer columns]`, load of a device / mean load, without and with copies.
        held: float32 `[E, D]`, share of the steps in which the device held a copy of the expert.
        steps: the steps that are kept exactly.
    """

    shape: Shape
    first: int
    last: int
    count: int
    run_steps: NDArray[np.int64]
    layer_steps: NDArray[np.int64]
    imbalance: Floats
    histogram: NDArray[np.int64]
    loads: Floats
    devices: Floats
    held: Floats
    steps: list[RecordedStep]


def read_levels(file: LayersFile) -> Levels:
    """Aggregate a `layers.bin`; reads it twice. ValueError if it is damaged or has no step."""
    shapes, count = [], 0
    for frame in file.frames():
        if frame.step == DESCRIPTION:
            shapes.append(frame.shape(file.path))
        else:
            count += 1
    if not count or not shapes:
        raise ValueError(f"{file.path}: has no step")
    reader = _Reader(shapes, count)
    for step in file:
        reader.add(step)
    return reader.result()


@dataclass
class _Columns:
    """Splits the steps into columns, and remembers where each begins."""

    count: int
    most: int
    begins: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = Parts(self.count, max(1, self.most))

    def of(self, index: int, step: int) -> int:
        column = self.parts.of(index)
        if column == len(self.begins):
            self.begins.append(step)
        return column


class _Reader:
    """Aggregates steps one by one.

    Args:
        shapes: all that occur; layers and experts must be equal.
        count: number of steps that will be added.
    """

    def __init__(self, shapes: list[Shape], count: int) -> None:
        self._shape = max(shapes, key=lambda shape: shape.num_devices)
        layers, devices, experts = len(self._shape.layers), self._shape.num_devices, self._shape.experts
        each = sum(experts) + 2 * layers * devices
        self._count = count
        self._run = _Columns(count, RUN_CELLS // (2 * layers))
        self._layer = _Columns(count, LAYER_CELLS // each)
        self._step = _Columns(count, STEP_CELLS // each)
        self._first_expert = np.cumsum([0, *experts])
        self._index, self._last = 0, 0
        self._imbalance = np.ones((self._run.parts.parts, 2, layers), dtype=np.float32)
        self._histogram = np.zeros((2, len(BINS) - 1), dtype=np.int64)
        self._loads = np.zeros((self._layer.parts.parts, sum(experts)), dtype=np.float32)
        self._devices = np.zeros((self._layer.parts.parts, 2, layers, devices), dtype=np.float32)
        self._held = np.zeros((sum(experts), devices), dtype=np.float32)
        self._kept: list[RecordedStep] = []

    def add(self, step: RecordedStep) -> None:
        """Add the next step."""
        run = self._imbalance[self._run.of(self._index, step.step)]
        np.maximum(run, step.imbalance, out=run)
        for counts, values in zip(self._histogram, step.imbalance, strict=True):
            counts += np.histogram(values, BINS)[0]
        column = self._layer.of(self._index, step.step)
        self._loads[column] += self._relative(step.loads)
        for total, loads in zip(self._devices[column], (step.before, step.after), strict=True):
            total[:, : loads.shape[1]] += loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)
        layer, expert, device, _ = step.copied.T.astype(np.int64)
        self._held[self._first_expert[layer] + expert, device] += 1
        self._keep(step)
        self._index, self._last = self._index + 1, step.step

    def _relative(self, loads: NDArray[Any]) -> Floats:
        """Loads over the mean of their layer."""
        first = self._first_expert
        means = np.add.reduceat(loads.astype(np.float32), first[:-1]) / np.diff(first)
        return np.divide(loads, np.repeat(np.maximum(means, 1e-9), np.diff(first))).astype(np.float32)

    def _keep(self, step: RecordedStep) -> None:
        column = self._step.of(self._index, step.step)
        if column == len(self._kept):
            self._kept.append(step)
        elif step.imbalance[1].max() > self._kept[column].imbalance[1].max():
            self._kept[column] = step

    def result(self) -> Levels:
        """What was aggregated."""
        sizes = self._layer.parts.sizes.astype(np.float32)
        return Levels(
            shape=self._shape,
            first=self._run.begins[0],
            last=self._last,
            count=self._count,
            run_steps=np.array(self._run.begins, dtype=np.int64),
            layer_steps=np.array(self._layer.begins, dtype=np.int64),
            imbalance=np.moveaxis(self._imbalance, 0, -1),
            histogram=self._histogram,
            loads=(self._loads / sizes[:, None]).T,
            devices=np.moveaxis(self._devices / sizes[:, None, None, None], 0, -1),
            held=(self._held / self._count).astype(np.float32),
            steps=self._kept,
        )
