"""Sends an exception to another rank, whether or not it can be pickled."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass

__all__ = ["Raised", "RemoteError"]


class RemoteError(Exception):
    """Cause of an exception that was first raised on another rank; contains that rank's traceback as text."""

    def __init__(self, rank: int, traceback_text: str) -> None:
        super().__init__(f"\n\nOn rank {rank}:\n{traceback_text}")


@dataclass(frozen=True)
class Raised:
    """What a rank sends to the others about an exception. Strings and bytes only, so it can always be pickled.

    Attributes:
        text: `str()` of the exception.
        summary: its class and text, as in the last line of a traceback.
        traceback: the whole traceback.
        pickled: the exception itself; None if it cannot be pickled, e.g. because its class is local to a function.
    """

    text: str
    summary: str
    traceback: str
    pickled: bytes | None

    @classmethod
    def of(cls, error: Exception) -> Raised:
        """Describe `error`; never raises."""
        summary = "".join(traceback.format_exception_only(type(error), error)).strip()
        whole = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        try:
            return cls(str(error), summary, whole, pickle.dumps(error))
        except Exception:
            return cls("", summary, whole, None)

    def rebuilt(self, rank: int, also: Exception | None) -> Exception:
        """The exception that `rank` raised; if it cannot be unpickled, a RuntimeError with its class and text.

        Args:
            rank: the rank that raised.
            also: what this rank raised itself, shown in the traceback too; None if nothing.
        """
        error = self._unpickled() or RuntimeError(f"rank {rank} raised {self.summary}")
        error.__cause__ = RemoteError(rank, self.traceback)
        error.__cause__.__cause__ = also
        return error

    def _unpickled(self) -> Exception | None:
        """The unpickled exception; None if it cannot be made or has another text.

        That happens if its `__init__` takes other arguments than those in `Exception.args`.
        """
        if self.pickled is None:
            return None
        try:
            error = pickle.loads(self.pickled)
            return error if isinstance(error, Exception) and str(error) == self.text else None
        except Exception:
            return None
