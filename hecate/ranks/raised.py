"""An exception on its way to another rank, whether it can be pickled or not."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass

__all__ = ["Raised", "RemoteError"]


class RemoteError(Exception):
    """The cause of an exception that another rank raised first: that rank's traceback, as text."""

    def __init__(self, rank: int, traceback_text: str) -> None:
        super().__init__(f"\n\nOn rank {rank}:\n{traceback_text}")


@dataclass(frozen=True)
class Raised:
    """What a rank tells the others about an exception. Strings and bytes only, so it always pickles.

    Attributes:
        text: `str()` of the exception.
        summary: its class and text, as in the last line of a traceback.
        traceback: the whole traceback.
        pickled: the exception itself; None if it cannot be pickled, as a class inside a function cannot.
    """

    text: str
    summary: str
    traceback: str
    pickled: bytes | None

    @classmethod
    def of(cls, error: Exception) -> Raised:
        """What to send of `error`; never raises."""
        summary = "".join(traceback.format_exception_only(type(error), error)).strip()
        whole = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        try:
            return cls(str(error), summary, whole, pickle.dumps(error))
        except Exception:
            return cls("", summary, whole, None)

    def rebuilt(self, rank: int, also: Exception | None) -> Exception:
        """The exception that `rank` raised; a RuntimeError with its class and text if it cannot be made again.

        Args:
            rank: who raised.
            also: what this rank raised itself, to be shown in the traceback too.
        """
        error = self._unpickled() or RuntimeError(f"rank {rank} raised {self.summary}")
        error.__cause__ = RemoteError(rank, self.traceback)
        error.__cause__.__cause__ = also
        return error

    def _unpickled(self) -> Exception | None:
        """None also if `__init__` does not take what `Exception` kept: then another text, or an error, comes out."""
        if self.pickled is None:
            return None
        try:
            error = pickle.loads(self.pickled)
            return error if isinstance(error, Exception) and str(error) == self.text else None
        except Exception:
            return None
