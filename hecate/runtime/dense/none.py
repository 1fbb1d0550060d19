"""The dense part left to the caller: the model runs on one device, or the caller has parallelized it."""

from __future__ import annotations

from hecate.runtime.dense.base import Dense

__all__ = ["CallersDense"]


class CallersDense(Dense):
    """Nothing to do: gradients of the dense part are the caller's."""

    def enter(self) -> None:
        """The caller's."""

    def leave(self) -> None:
        """The caller's."""

    def reduce(self) -> None:
        """The caller's."""

    def drop(self) -> None:
        """The caller's."""
