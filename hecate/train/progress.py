"""Terminal output of rank 0: a progress bar while training, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

__all__ = ["Progress", "print_table"]


class Progress:
    """Progress bar with loss, tokens per second and imbalance; if not on a terminal, 20 lines per run instead."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self._steps, self._shown = steps, shown
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
        if "validation_non_finite" in metrics:
            self.say(metrics["validation_non_finite"])
        if "skipped" in metrics:
            self.say(f"skipped {metrics['skipped']}")
            self._bar.update(self._task, advance=1)
            return
        text = (
            f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"imbalance {metrics['imbalance_before']:.2f} -> {metrics['imbalance_after']:.2f}"
        )
        self._bar.update(self._task, advance=1, text=text)
        step = metrics["step"]
        if self._shown and not self._console.is_terminal and step % max(self._steps // 20, 1) == 0:
            print(f"step {step}/{self._steps}  {text}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._shown:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


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
