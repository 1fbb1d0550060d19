"""Every exception of this package that a user may catch; whatever else it raises is a ValueError, OSError or bug."""

from __future__ import annotations

from datetime import timedelta

__all__ = ["MissingRankError", "NonFiniteError"]


class NonFiniteError(ValueError):
    """A forward pass met a value that is NaN or infinite; raised at the same place on all ranks."""


class MissingRankError(RuntimeError):
    """A collective failed because ranks stopped; `ranks` are those whose heart beats no more."""

    def __init__(self, ranks: list[int], silent_for: timedelta, why: str | None = None) -> None:
        named = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
        silent = f"no heartbeat for {silent_for.total_seconds():g} s; it died or hangs"
        super().__init__(f"{named} missing: {silent if why is None else why}")
        self.ranks = ranks
        self._arguments = (ranks, silent_for, why)

    def __reduce__(self) -> tuple[type[MissingRankError], tuple[list[int], timedelta, str | None]]:
        return type(self), self._arguments
