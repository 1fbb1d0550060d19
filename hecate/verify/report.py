"""What a verification found: a row for each way of training and quantity, and a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["START", "WHOLE_RUN", "Report", "Row", "table"]

START = "start"
"""Name, in place of a way, of the row that compares the weights that the ranks start from."""

WHOLE_RUN = "run"
"""The quantity of a row that says that a way of training raised an error."""


@dataclass(frozen=True)
class Row:
    """One quantity under one way of training.

    Attributes:
        way: way of training, e.g. "re-sharding".
        quantity: what was compared, e.g. "gradient dense".
        error: the largest relative error; infinite if a tensor is missing, NaN if a value is NaN.
        where: place of that error: step, and name of the tensor; or the error that the way raised.
        tolerance: largest error that counts as equal; 0 asks for the same bits.
    """

    way: str
    quantity: str
    error: float
    where: str
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        """One of "equal", "differs" and "failed" (it raised an error)."""
        return "equal" if self.ok else "failed" if self.quantity == WHOLE_RUN else "differs"

    def __str__(self) -> str:
        if self.quantity == WHOLE_RUN:
            return f"{self.way}: {self.where}"
        relation = "<=" if self.ok else ">"
        return f"{self.way}: {self.quantity}: {self.error:.2g} {relation} {self.tolerance:g} at {self.where}"


@dataclass(frozen=True)
class Report:
    """What `hecate.verify` returns, the same on every rank; `print(report)` shows it as a table.

    Attributes:
        title: model, ranks, precision, steps and optimizer, in words.
        rows: all that was compared.
        activity: way -> {"copies": copies of experts that were planned, "moved": experts that got a new owner}, sums
            over layers and steps: a way that was to move experts and moved none proves nothing.
        notes: what was left out or changed, and why.
    """

    title: str
    rows: tuple[Row, ...]
    activity: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every quantity of every way equals the plain model's."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are not ok."""
        return tuple(row for row in self.rows if not row.ok)

    def __str__(self) -> str:
        bounds = dict.fromkeys(row.tolerance for row in self.rows if row.quantity != WHOLE_RUN)
        equal = " or ".join("the same bits" if bound == 0 else f"within {bound:g}" for bound in bounds)
        lines = [self.title, f"Largest error relative to the plain model in one process; equal means {equal}.", ""]
        lines += [*self._table(), ""]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"not equal: {row}" for row in self.failures]
        lines.append("Hecate trains as the plain model does." if self.ok else "NOT PROVEN: see the rows above.")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """A line for each way, a column for each quantity."""
        shown = [row for row in self.rows if row.way != START] or self.rows
        quantities = list(dict.fromkeys(row.quantity for row in shown if row.quantity != WHOLE_RUN))
        lines = [["", *quantities, "copies", "moved", "largest error", "verdict"]]
        for way in dict.fromkeys(row.way for row in shown):
            rows = {row.quantity: row for row in shown if row.way == way}
            worst = max(rows.values(), key=lambda row: (not row.ok, row.error))
            errors = [_short(rows[q].error) if q in rows else "-" for q in quantities]
            activity = [str(self.activity.get(way, {}).get(what, "-")) for what in ("copies", "moved")]
            lines.append([way, *errors, *activity, _short(worst.error), worst.verdict])
        return table(lines)


def _short(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}"


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right; titles of several words are stacked."""
    titles = [title.split(" ") for title in lines[0]]
    height = max(map(len, titles))
    stacked = [[""] * (height - len(words)) + words for words in titles]
    body = [*zip(*stacked, strict=True), *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    return [_aligned(line, widths) for line in body]


def _aligned(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return " ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()
