"""Rows, verdicts and the table."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest

from hecate.verify.report import START, WHOLE_RUN, Report, Row, table

GOOD = Row("policy ep", "loss", 1e-12, "step 1", 1e-9)
BAD = Row("re-sharding", "weights", 0.25, "after step 4, head.weight", 1e-9)
FAILED = Row("no_sync", WHOLE_RUN, math.inf, "RuntimeError: no", 1e-9)
SAME = Row(START, "weights at start", 0.0, "rank 0, head.weight", 0.0)


@pytest.mark.parametrize(
    ("error", "tolerance", "ok"),
    [(0.0, 0.0, True), (1e-9, 1e-9, True), (2e-9, 1e-9, False), (math.nan, 1.0, False), (math.inf, 1.0, False)],
)
def test_verdict(error: float, tolerance: float, ok: bool) -> None:
    row = Row("way", "loss", error, "step 0", tolerance)
    assert (row.ok, row.verdict) == (ok, "equal" if ok else "differs")


def test_ok_needs_rows_and_all_of_them() -> None:
    assert Report("", (SAME, GOOD)).ok
    assert not Report("", (SAME, GOOD, BAD)).ok
    assert not Report("", ()).ok
    assert Report("", (GOOD, BAD, FAILED)).failures == (BAD, FAILED)
    assert FAILED.verdict == "failed"


def test_text_says_what_differs_and_where() -> None:
    text = str(Report("A model.", (SAME, GOOD, BAD, FAILED), {"policy ep": {"copies": 3, "moved": 0}}, ("a note",)))
    lines = text.splitlines()
    assert lines[0] == "A model."
    assert "not equal: re-sharding: weights: 0.25 > 1e-09 at after step 4, head.weight" in lines
    assert "not equal: no_sync: RuntimeError: no" in lines
    assert "note: a note" in lines
    assert lines[-1].startswith("NOT PROVEN")
    (line,) = (line for line in lines if line.startswith("policy ep"))
    assert line.split() == ["policy", "ep", "1e-12", "-", "3", "0", "1e-12", "equal"]
    assert not any(line.startswith(START) for line in lines)


def test_text_of_a_start_that_differs_shows_it() -> None:
    text = str(Report("", (Row(START, "weights at start", 0.5, "rank 1, head.weight", 0.0),)))
    assert "not equal: start: weights at start: 0.5 > 0 at rank 1, head.weight" in text
    assert any(line.startswith(START) for line in text.splitlines())


def test_table_is_aligned() -> None:
    assert table([["", "two words", "b"], ["row", "1", "22"]]) == ["      two", "    words  b", "row     1 22"]


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        GOOD.error = 0.0  # type: ignore[misc]
