"""What the engine asks of the model's parameters other than experts."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Dense"]


class Dense(ABC):
    """The dense part of the model between and during passes.

    The engine calls, on all ranks alike: `enter` before a forward or backward pass, `leave` after it, `await_gradients`
    when a backward pass begins and `reduce` when its gradients are complete, or `drop` if it raised or its step is
    skipped.

    Attributes:
        sync: whether `reduce` is to reduce; False inside `no_sync`.
        awaited: whether a backward pass runs that `reduce` will end.
        keeps_weights: whether tensors that a pass computed with stay as they are until the next step.
    """

    sync = True
    awaited = False
    keeps_weights = True

    def set_sync(self, sync: bool) -> None:
        """Reduce gradients after the backward passes from now on, or accumulate them only."""
        self.sync = sync

    @abstractmethod
    def enter(self) -> None:
        """A pass begins: modules must hold what they compute with."""

    @abstractmethod
    def leave(self) -> None:
        """No pass runs: parameters are where the optimizer and the checkpoint look for them. May be called twice."""

    def leave_evaluation(self) -> None:
        """A forward pass is over that no backward pass follows."""
        self.leave()

    def await_gradients(self) -> None:
        """A backward pass of the whole model begins; `reduce` or `drop` will be called when it is over."""
        self.awaited = True

    @abstractmethod
    def reduce(self) -> None:
        """Average the gradients over all ranks. Collective."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the gradients that were not reduced yet."""
