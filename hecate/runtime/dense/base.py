"""The interface through which the engine handles the dense part: the model's parameters other than experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Dense"]


class Dense(ABC):
    """The dense part of the model, between and during passes.

    The engine calls these methods in the same order on all ranks: `enter` before a forward or backward pass, `leave`
    after it, `await_gradients` when a backward pass begins, `reduce` when its gradients are complete, and `drop` if it
    raised or its step is skipped.

    Attributes:
        sync: whether `reduce` reduces gradients; False inside `no_sync`.
        awaited: whether a backward pass is running for which the engine will call `reduce`.
        keeps_weights: whether the tensors that a pass computes with keep their values until the next step.
    """

    sync = True
    awaited = False
    keeps_weights = True

    def set_sync(self, sync: bool) -> None:
        """Set whether gradients are reduced after each backward pass from now on, or only accumulated."""
        self.sync = sync

    @abstractmethod
    def enter(self) -> None:
        """Prepare for a pass: put the tensors that it computes with into the modules."""

    @abstractmethod
    def leave(self) -> None:
        """End a pass: put parameters back where optimizers and checkpoints expect them. May be called twice."""

    def leave_evaluation(self) -> None:
        """Like `leave`, after a forward pass that no backward pass follows."""
        self.leave()

    def await_gradients(self) -> None:
        """Note that a backward pass of the model begins; the engine calls `reduce` or `drop` when it is over."""
        self.awaited = True

    @abstractmethod
    def reduce(self) -> None:
        """Average the gradients over all ranks. Collective."""

    @abstractmethod
    def drop(self) -> None:
        """Drop gradients that were not reduced yet."""

    # What a dense part keeps outside of parameters and of the caller's optimizer; by default nothing.

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Further optimizers, which have state of the dense part."""
        return ()

    def gradient_norm(self) -> Tensor | None:
        """Norm of gradients that are not in `.grad`, the same on all ranks; None if there are none. Collective."""
        return None

    def scale_gradients(self, factor: Tensor) -> None:  # noqa: B027  # the default does nothing
        """Multiply the gradients that are not in `.grad` by `factor`, a scalar <= 1."""

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """Whole tensors with exacter values than those of parameters. Collective."""
        return {}

    def took_weights(self, masters: Mapping[nn.Parameter, Tensor] | None = None) -> None:  # noqa: B027
        """Called when parameters, or their `masters`, have new values."""

    @contextmanager
    def with_state(self, optimizer: Optimizer | None) -> Iterator[None]:
        """Inside, `optimizer.state` has the state of all parameters, that of the dense part included. Collective."""
        yield

    def took_state(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Called when `optimizer.state` has been loaded."""
