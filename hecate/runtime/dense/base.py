"""What the engine asks of the model's parameters other than experts."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Dense"]


class Dense(ABC):
    """The dense part of the model between and during passes.

    The engine calls, on all ranks alike: `enter` before a forward or backward pass, `leave` after it, `reduce` when
    the gradients of a backward pass are complete, and `drop` instead if a pass raised or its step is skipped.

    Attributes:
        sync: whether `reduce` is to reduce; False inside `no_sync`.
    """

    sync = True

    def set_sync(self, sync: bool) -> None:
        """Reduce gradients after the backward passes from now on, or accumulate them only."""
        self.sync = sync

    @abstractmethod
    def enter(self) -> None:
        """A pass begins: modules must hold what they compute with."""

    @abstractmethod
    def leave(self) -> None:
        """No pass runs: parameters are where the optimizer and the checkpoint look for them. May be called twice."""

    @abstractmethod
    def reduce(self) -> None:
        """Average the gradients over all ranks. Collective."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the gradients that were not reduced yet."""
