"""The dense part in several parts, each kept in its own way."""

from __future__ import annotations

from hecate.runtime.dense.base import Dense

__all__ = ["DenseParts"]


class DenseParts(Dense):
    """Does with all of `parts` what the engine asks, in order: on all ranks alike, if the parts are."""

    def __init__(self, *parts: Dense) -> None:
        self._parts = parts

    def set_sync(self, sync: bool) -> None:
        """Reduce gradients after the backward passes from now on, or accumulate them only."""
        super().set_sync(sync)
        for part in self._parts:
            part.set_sync(sync)

    def enter(self) -> None:
        """A pass begins."""
        for part in self._parts:
            part.enter()

    def leave(self) -> None:
        """No pass runs."""
        for part in self._parts:
            part.leave()

    def leave_evaluation(self) -> None:
        """A forward pass is over that no backward pass follows."""
        for part in self._parts:
            part.leave_evaluation()

    def await_gradients(self) -> None:
        """A backward pass of the whole model begins."""
        super().await_gradients()
        for part in self._parts:
            part.await_gradients()

    def reduce(self) -> None:
        """Average the gradients over all ranks. Collective."""
        for part in self._parts:
            part.reduce()

    def drop(self) -> None:
        """Forget the gradients that were not reduced yet."""
        for part in self._parts:
            part.drop()
