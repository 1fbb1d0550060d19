"""One picture of a training run: loss, imbalance, throughput, copies, and the load of every expert over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from numpy.typing import NDArray

from hecate.report.curves import Curves, read_curves

__all__ = ["plot_run"]

LOSS, BEFORE, AFTER, GREY = "#1f4e79", "#c8553d", "#2a9d8f", "#5f6b76"


class Panel(NamedTuple):
    """A diagram above the heat maps.

    Attributes:
        title, unit: what it shows.
        lines: metric, color, label and line style of each curve.
        bottom: where its vertical axis begins; None: at the smallest value.
        ideal: a value that a faint line marks; None: no line.
        validation: whether it also shows the losses of validation.
    """

    title: str
    unit: str
    lines: Sequence[tuple[str, str, str, str]]
    bottom: float | None = None
    ideal: float | None = None
    validation: bool = False


PANELS = (
    Panel("training loss", "nats per token", [("loss", LOSS, "training loss", "-")], validation=True),
    Panel(
        "imbalance of the devices",
        "max / mean load",
        [
            ("imbalance_before", BEFORE, "without copies, mean over layers", "-"),
            ("imbalance_after", AFTER, "with copies, mean over layers", "-"),
            ("imbalance_worst", LOSS, "with copies, worst layer", ":"),
        ],
        ideal=1.0,
    ),
    Panel("throughput", "tokens per second", [("tokens_per_second", LOSS, "throughput", "-")], bottom=0.0),
    Panel(
        "copies of all layers",
        "copies",
        [("copies", LOSS, "all", "-"), ("copies_calibrated", BEFORE, "made after the gate", "--")],
        bottom=0.0,
    ),
)


def plot_run(
    metrics: Iterable[Mapping[str, Any]],
    path: str | Path,
    title: str,
    other: tuple[str, Iterable[Mapping[str, Any]]] | None = None,
) -> None:
    """Draw the steps of a run into the PNG `path`.

    Args:
        metrics: one mapping per step, with `step`, those of `curves.NAMES`, and `loads` (per layer, tokens routed to
            each expert), as `RecordedRun` gives them; iterated twice, never held in memory as a whole.
        path: path of the PNG.
        title: title of the picture.
        other: name and metrics of a second run; its curves are drawn in grey.
    """
    curves = read_curves(metrics)
    second = None if other is None else (other[0], read_curves(other[1]))
    heat_rows = -(-len(curves.layers) // 2)
    figure = Figure(figsize=(11, 5.8 + 1.75 * heat_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    grid = figure.add_gridspec(2 + heat_rows, 2, height_ratios=[1.7, 1.4] + [1.0] * heat_rows)
    for place, panel in enumerate(PANELS):
        _plot_panel(figure.add_subplot(grid[place // 2, place % 2]), panel, curves, second)
    if curves.layers:
        _plot_heat_maps(figure, grid, curves)
    figure.savefig(path, dpi=130)


def _plot_heat_maps(figure: Figure, grid: GridSpec, curves: Curves) -> None:
    heat_axes = []
    for place, layer in enumerate(curves.layers):
        axes = figure.add_subplot(grid[2 + place // 2, place % 2])
        image = _plot_loads(axes, curves, place, f"layer {layer}")
        axes.tick_params(labelbottom=place >= len(curves.layers) - 2)
        heat_axes.append(axes)
    bar = figure.colorbar(image, ax=heat_axes, shrink=0.9, pad=0.01, aspect=30)
    bar.set_label("expert load / mean expert load", fontsize=9)
    bar.outline.set_visible(False)
    for axes in heat_axes[-2:]:
        axes.set_xlabel("step", fontsize=9)


def _plot_panel(axes: Axes, panel: Panel, curves: Curves, second: tuple[str, Curves] | None) -> None:
    """Draw the curves of one panel, those of the second run thin and behind."""
    for name, color, label, style in panel.lines:
        if second is not None:
            theirs = second[1].values[name].mean
            axes.plot(second[1].steps, _smooth(theirs), color=GREY, linewidth=1.2, linestyle=style, alpha=0.8)
        _plot_curve(axes, curves, name, color, label, style)
    if panel.validation and curves.validation:
        axes.plot(*zip(*curves.validation, strict=True), "o", color=AFTER, markersize=5, label="validation loss")
    if second is not None:
        axes.plot([], [], color=GREY, linewidth=1.2, label=second[0])
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)
    if panel.ideal is not None:
        axes.axhline(panel.ideal, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=panel.bottom)
    _style(axes, panel.title, panel.unit)


def _plot_curve(axes: Axes, curves: Curves, name: str, color: str, label: str, style: str) -> None:
    """Draw the range from minimum to maximum of each point faintly, and the smoothed mean on top."""
    curve = curves.values[name]
    if np.array_equal(curve.low, curve.high):
        axes.plot(curves.steps, curve.mean, color=color, alpha=0.25, linewidth=0.8)
    else:
        strokes = np.stack([curve.low, curve.high], axis=1).ravel()
        axes.plot(np.repeat(curves.steps, 2), strokes, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(curves.steps, _smooth(curve.mean), color=color, linewidth=1.8, label=label, linestyle=style)


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
