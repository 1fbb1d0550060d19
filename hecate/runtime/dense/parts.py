"""A dense part that consists of several parts, e.g. one sharded and one replicated."""

from __future__ import annotations

from hecate.runtime.dense.base import Dense

__all__ = ["DenseParts"]


class DenseParts(Dense):
    """Forwards every call to all `parts`, in their order, which must be the same on all ranks."""

    def __init__(self, *parts: Dense) -> None:
        self._parts = parts
        self.keeps_weights = all(part.keeps_weights for part in parts)

    def set_sync(self, sync: bool) -> None:
        """Set whether gradients are reduced after each backward pass from now on, or only accumulated."""
        super().set_sync(sync)
        for part in self._parts:
            part.set_sync(sync)

    def enter(self) -> None:
        """Prepare all parts for a pass."""
        for part in self._parts:
            part.enter()

    def leave(self) -> None:
        """End a pass."""
        for part in self._parts:
            part.leave()

    def leave_evaluation(self) -> None:
        """End a forward pass that no backward pass follows."""
        for part in self._parts:
            part.leave_evaluation()

    def await_gradients(self) -> None:
        """Note that a backward pass of the model begins."""
        super().await_gradients()
        for part in self._parts:
            part.await_gradients()

    def reduce(self) -> None:
        """Average the gradients over all ranks. Collective."""
        for part in self._parts:
            part.reduce()

    def drop(self) -> None:
        """Drop gradients that were not reduced yet."""
        for part in self._parts:
            part.drop()
