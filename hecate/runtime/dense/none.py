"""The dense part left to the caller: the model runs on one device, or the caller parallelizes it."""

from __future__ import annotations

from hecate.runtime.dense.base import Dense

__all__ = ["CallersDense"]


class CallersDense(Dense):
    """Does nothing: parameters and gradients of the dense part are left to the caller."""

    def enter(self) -> None:
        """Does nothing."""

    def leave(self) -> None:
        """Does nothing."""

    def reduce(self) -> None:
        """Does nothing."""

    def drop(self) -> None:
        """Does nothing."""
