"""Makes linear maps differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Begun", "linear"]

Map = Callable[[Tensor], Callable[[], Tensor]]
"""Starts to compute a linear map, and returns what waits for its result, which must not be the argument itself."""


def linear(x: Tensor, there: Map, back: Map, between: Callable[[], None] | None = None) -> Tensor:
    """The linear map `there` of `x`, differentiable any number of times.

    No tensor is saved, so that activation checkpointing repeats the same maps on all ranks, whatever rows each has.

    With work in between, each direction is two nodes of the graph; see `Begun`.

    Args:
        x: the argument.
        there: the map.
        back: its transpose.
        between: what to compute between the start and the end of `there`, with autograd. If it raises, the end is
            awaited first.
    """
    if between is None:
        return _Whole.apply(x, there, back)
    begun = Begun(x, there, back)
    try:
        between()
    except BaseException:
        begun.abandon()
        raise
    return begun.end()


class Begun:
    """A linear map as `linear`'s that has been started. Its start and its end are nodes of the graph of their own.

    Autograd runs nodes in the reverse order of their making, so the backward of what is computed in between runs while
    the gradient is on its way back.

    Args:
        x: the argument.
        there: the map.
        back: its transpose.
    """

    def __init__(self, x: Tensor, there: Map, back: Map) -> None:
        self._there, self._back = _Way(there), _Way(back)
        self._ticket = _Start.apply(x, self._there, self._back)

    def end(self) -> Tensor:
        """Wait for the result. Called once."""
        return _End.apply(self._ticket, self._there, self._back)

    def abandon(self) -> None:
        """Wait for the result and drop it, unless it has ended."""
        if self._there.underway:
            self._there.end()


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, there: Map, back: Map) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.there, ctx.back = there, back
        return there(x)()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _Whole.apply(grad, ctx.back, ctx.there), None, None


class _Way:
    """A map that has been started or not."""

    def __init__(self, start: Map) -> None:
        self._start = start
        self._end: Callable[[], Tensor] | None = None

    @property
    def underway(self) -> bool:
        return self._end is not None

    def start(self, x: Tensor) -> None:
        self._end = self._start(x)

    def end(self) -> Tensor:
        end, self._end = self._end, None
        assert end is not None
        return end()


class _Start(torch.autograd.Function):
    """Starts a map. Its output has no elements: it only tells autograd that the end depends on the start."""

    @staticmethod
    def forward(ctx, x: Tensor, way: _Way, back: _Way) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.way, ctx.back = way, back
        way.start(x)
        return torch.empty(0, device=x.device)

    @staticmethod
    def backward(ctx, ticket: Tensor):  # type: ignore[no-untyped-def]
        return _End.apply(ticket, ctx.back, ctx.way), None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: Tensor, way: _Way, back: _Way) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.way, ctx.back = way, back
        return way.end()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _Start.apply(grad, ctx.back, ctx.way), None, None
