"""One picture of a training run: loss, imbalance, and the load of every expert over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["plot_run"]

LOSS, BEFORE, AFTER, GREY = "#1f4e79", "#c8553d", "#2a9d8f", "#5f6b76"
MAX_LAYERS = 12
MAX_COLUMNS = 400


def plot_run(metrics: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Draw the steps of a `metrics.jsonl` into the PNG `path`.

    Args:
        metrics: one mapping a step, with `step`, `loss`, `imbalance_before`, `imbalance_after` and `loads` (per layer,
            tokens routed to each expert).
        path: of the PNG.
        title: above everything.
    """
    loads = np.array([m["loads"] for m in metrics], dtype=np.float64)  # [steps, layers, experts]
    layers = np.unique(np.linspace(0, loads.shape[1] - 1, min(loads.shape[1], MAX_LAYERS)).round().astype(int))
    heat_rows = -(-len(layers) // 2)
    figure = Figure(figsize=(11, 3.4 + 1.75 * heat_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    grid = figure.add_gridspec(1 + heat_rows, 2, height_ratios=[1.7] + [1.0] * heat_rows)
    steps = np.array([m["step"] for m in metrics])
    _plot_loss(figure.add_subplot(grid[0, 0]), steps, metrics)
    _plot_imbalance(figure.add_subplot(grid[0, 1]), steps, metrics)
    heat_axes = []
    for place, layer in enumerate(layers):
        axes = figure.add_subplot(grid[1 + place // 2, place % 2])
        image = _plot_loads(axes, steps, loads[:, layer], f"layer {layer}")
        axes.tick_params(labelbottom=place >= len(layers) - 2)
        heat_axes.append(axes)
    bar = figure.colorbar(image, ax=heat_axes, shrink=0.9, pad=0.01, aspect=30)
    bar.set_label("expert load / mean expert load", fontsize=9)
    bar.outline.set_visible(False)
    for axes in heat_axes[-2:]:
        axes.set_xlabel("step", fontsize=9)
    figure.savefig(path, dpi=130)


def _plot_loss(axes: Axes, steps: NDArray[np.int64], metrics: Sequence[Mapping[str, Any]]) -> None:
    loss = np.array([m["loss"] for m in metrics])
    axes.plot(steps, loss, color=LOSS, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(loss), color=LOSS, linewidth=1.8, label="training loss")
    measured = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
    if measured:
        axes.plot(*zip(*measured, strict=True), "o", color=AFTER, markersize=5, label="validation loss")
        axes.legend(frameon=False, fontsize=9)
    _style(axes, "training loss", "nats per token")


def _plot_imbalance(axes: Axes, steps: NDArray[np.int64], metrics: Sequence[Mapping[str, Any]]) -> None:
    for key, color, label in (
        ("imbalance_before", BEFORE, "without copies"),
        ("imbalance_after", AFTER, "with copies"),
    ):
        values = np.array([m[key] for m in metrics])
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=color, linewidth=1.8, label=label)
    axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=9)
    _style(axes, "imbalance of the devices, mean over layers", "max / mean load")


def _plot_loads(axes: Axes, steps: NDArray[np.int64], loads: NDArray[np.float64], title: str) -> Any:
    """Heat map of one layer's `loads` `[steps, experts]`, each step divided by its mean; 1 is an even load."""
    relative = loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)
    columns = [part.mean(axis=0) for part in np.array_split(relative, min(len(relative), MAX_COLUMNS))]
    extent = (float(steps[0]), float(steps[-1]) + 1, loads.shape[1] - 0.5, -0.5)
    image = axes.imshow(
        np.stack(columns, axis=1), aspect="auto", extent=extent, cmap="magma", vmin=0, vmax=3, interpolation="nearest"
    )
    axes.set_title(title, fontsize=9, loc="left", color=GREY)
    axes.set_ylabel("expert", fontsize=9)
    axes.tick_params(labelsize=8, length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a window of a fortieth of the run, cut at both ends."""
    width = max(len(values) // 40, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    begin = np.maximum(np.arange(len(values)) - width, 0)
    end = np.minimum(np.arange(len(values)) + width + 1, len(values))
    return (total[end] - total[begin]) / (end - begin)


def _style(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(unit, fontsize=9)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.2)
    axes.margins(x=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
