"""One picture of a training run: loss, imbalance, and the load of every expert over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hecate.report.curves import Curves, read_curves

__all__ = ["plot_run"]

LOSS, BEFORE, AFTER, GREY = "#1f4e79", "#c8553d", "#2a9d8f", "#5f6b76"


def plot_run(metrics: Iterable[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Draw the steps of a `metrics.jsonl` into the PNG `path`.

    Args:
        metrics: one mapping per step, with `step`, `loss`, `imbalance_before`, `imbalance_after` and `loads` (per
            layer, tokens routed to each expert); iterated twice, never held in memory as a whole.
        path: path of the PNG.
        title: title of the picture.
    """
    curves = read_curves(metrics)
    heat_rows = -(-len(curves.layers) // 2)
    figure = Figure(figsize=(11, 3.4 + 1.75 * heat_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    grid = figure.add_gridspec(1 + heat_rows, 2, height_ratios=[1.7] + [1.0] * heat_rows)
    _plot_loss(figure.add_subplot(grid[0, 0]), curves)
    _plot_imbalance(figure.add_subplot(grid[0, 1]), curves)
    heat_axes = []
    for place, layer in enumerate(curves.layers):
        axes = figure.add_subplot(grid[1 + place // 2, place % 2])
        image = _plot_loads(axes, curves, place, f"layer {layer}")
        axes.tick_params(labelbottom=place >= len(curves.layers) - 2)
        heat_axes.append(axes)
    bar = figure.colorbar(image, ax=heat_axes, shrink=0.9, pad=0.01, aspect=30)
    bar.set_label("expert load / mean expert load", fontsize=9)
    bar.outline.set_visible(False)
    for axes in heat_axes[-2:]:
        axes.set_xlabel("step", fontsize=9)
    figure.savefig(path, dpi=130)


def _plot_loss(axes: Axes, curves: Curves) -> None:
    _plot_curve(axes, curves, "loss", LOSS, "training loss")
    if curves.validation:
        axes.plot(*zip(*curves.validation, strict=True), "o", color=AFTER, markersize=5, label="validation loss")
        axes.legend(frameon=False, fontsize=9)
    _style(axes, "training loss", "nats per token")


def _plot_imbalance(axes: Axes, curves: Curves) -> None:
    _plot_curve(axes, curves, "imbalance_before", BEFORE, "without copies")
    _plot_curve(axes, curves, "imbalance_after", AFTER, "with copies")
    axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=9)
    _style(axes, "imbalance of the devices, mean over layers", "max / mean load")


def _plot_curve(axes: Axes, curves: Curves, name: str, color: str, label: str) -> None:
    """Draw the range from minimum to maximum of each point faintly, and the smoothed mean on top."""
    curve = curves.values[name]
    if np.array_equal(curve.low, curve.high):
        axes.plot(curves.steps, curve.mean, color=color, alpha=0.25, linewidth=0.8)
    else:
        strokes = np.stack([curve.low, curve.high], axis=1).ravel()
        axes.plot(np.repeat(curves.steps, 2), strokes, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(curves.steps, _smooth(curve.mean), color=color, linewidth=1.8, label=label)


def _plot_loads(axes: Axes, curves: Curves, place: int, title: str) -> Any:
    """Draw the heat map of one of the shown layers; 1 is an even load."""
    loads = curves.loads[place]
    extent = (float(curves.first), float(curves.last) + 1, len(loads) - 0.5, -0.5)
    image = axes.imshow(loads, aspect="auto", extent=extent, cmap="magma", vmin=0, vmax=3, interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left", color=GREY)
    axes.set_ylabel("expert", fontsize=9)
    axes.tick_params(labelsize=8, length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving mean over a fortieth of the points on each side, less at both ends."""
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
