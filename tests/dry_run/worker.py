"""What the processes run that have the fake runtime. Importing this file does not import torch."""

from __future__ import annotations

import traceback

from tests.dry_run.records import Case, Outcome

__all__ = ["run", "unnoticed"]


def run(case: Case, rank: int) -> Outcome | str:
    """One rank, in a process that has the fake runtime; returns the traceback if it raises."""
    from tests.dry_run.run import run_rank

    try:
        return run_rank(case, rank)
    except Exception:
        return traceback.format_exc()


def unnoticed() -> list[str]:
    """Faults made on purpose that the fake device does not report."""
    from tests.dry_run.selfcheck import missed

    return missed()
