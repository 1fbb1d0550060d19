"""What rank 0 prints: a banner, a progress bar (on a terminal) or a line per interval, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

__all__ = ["MOST_SECONDS", "Progress", "line", "print_table"]

MOST_SECONDS = 60.0
"""If not on a terminal, a line is printed at least this often."""


class Progress:
    """Progress bar with loss, tokens per second and imbalance; if not on a terminal, a line per interval instead.

    Args:
        steps: steps of the run.
        done: steps that were made before.
        interval: steps between lines.
        shown: whether anything is printed.
        peak: TFLOP/s that a device can reach, or None.
    """

    def __init__(self, steps: int, done: int, interval: int, shown: bool, peak: float | None = None) -> None:
        self._steps, self._interval, self._shown, self._peak = steps, interval, shown, peak
        self._said = -MOST_SECONDS  # when the last line was printed: the first step gets one
        self._console = Console()
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, text="")

    def advance(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of one more step, or why it was skipped."""
        if "skipped" in metrics:
            self.say(f"skipped {metrics['skipped']}")
            self._bar.update(self._task, advance=1)
        else:
            text = (
                f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
                f"imbalance {metrics['imbalance_before']:.2f} -> {metrics['imbalance_after']:.2f}"
            )
            self._bar.update(self._task, advance=1, text=text)
            self._say_line(metrics)
        if "validation_non_finite" in metrics:
            self.say(metrics["validation_non_finite"])
        elif "validation_loss" in metrics:
            self.say(f"step {metrics['step']}/{self._steps}  validation loss {metrics['validation_loss']:.4f}")

    def _say_line(self, metrics: Mapping[str, Any]) -> None:
        step, now = metrics["step"], time.monotonic()
        due = step % self._interval == 0 or step == self._steps or now - self._said >= MOST_SECONDS
        if due and not self._console.is_terminal:
            self._said = now
            self.say(f"step {step}/{self._steps}  {line(metrics, self._peak)}")

    def say(self, text: str) -> None:
        """Print a line above the bar; with the time, if not on a terminal."""
        if not self._shown:
            return
        if self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def line(metrics: Mapping[str, Any], peak: float | None = None) -> str:
    """The metrics of a step in one line; with `peak`, in TFLOP/s per device, also the share of it that was reached."""
    devices = metrics["devices"]
    return (
        f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  grad norm {metrics['grad_norm']:.3f}  "
        f"{metrics['tokens_per_second']:,.0f} tokens/s ({metrics['tokens_per_second'] / devices:,.0f}"
        f"{_work(metrics['tflops'], devices, peak)})  "
        f"imbalance {metrics['imbalance_before']:.2f} -> {metrics['imbalance_after']:.2f}, worst "
        f"{metrics['imbalance_worst']:.2f} in {metrics['worst_layer']}{_balance(metrics)}  "
        f"memory {_size(metrics['memory_bytes'])}  data {metrics['data_seconds'] * 1000:.1f} ms"
    )


def _balance(metrics: Mapping[str, Any]) -> str:
    """Why the worst layer has no copies or too few, how well loads were predicted, and how long planning took."""
    why = f" ({metrics['why']})" if metrics.get("why") else ""
    missed = metrics.get("mispredicted")
    predicted = "" if missed is None else f", {1 - missed:.0%} of loads predicted"
    return f"{why}{predicted}, planned in {metrics['planning_seconds'] * 1000:.1f} ms"


def _work(tflops: float | None, devices: int, peak: float | None) -> str:
    """What follows a number of tokens/s; without TFLOP/s if they are unknown."""
    if tflops is None:
        return " per device"
    mfu = "" if peak is None else f", MFU {tflops / devices / peak:.1%}"
    return f" and {tflops / devices:.3g} TFLOP/s per device{mfu}"


def print_table(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the summary of a run as a table."""
    table = Table(title=f"{summary['name']}: {summary['steps']} steps, policy {summary['policy']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    if summary["val_bits_per_byte"] is not None:
        table.add_row("validation bits per byte", f"{summary['val_bits_per_byte']:.3f}")
    else:
        table.add_row("validation bits per token", f"{summary['val_bits_per_token']:.3f}")
    table.add_row("tokens per second", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("imbalance before copies", f"{summary['imbalance_before']:.3f}")
    table.add_row("imbalance after copies", f"{summary['imbalance_after']:.3f}")
    table.add_row("copied", _size(summary["bytes_copied"]))
    table.add_row("exposed communication", f"{summary['exposed_seconds']:.1f} s of {summary['seconds']:.1f} s")
    for kind, size in summary["memory_bytes"].items():
        table.add_row(f"peak memory, {kind}", _size(size))
    console = Console()
    console.print(table)
    console.print(f"files: {folder}/", highlight=False)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
