"""Makes linear maps differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["linear"]

Map = Callable[[Tensor], Tensor]


def linear(x: Tensor, there: Map, back: Map) -> Tensor:
    """`there(x)`, differentiable any number of times.

    No tensor is saved, so that activation checkpointing repeats the same maps on all ranks, whatever rows each has.

    Args:
        x: the argument.
        there: a linear map; neither it nor `back` may return its argument itself.
        back: its transpose.
    """
    return _Linear.apply(x, there, back)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, there: Map, back: Map) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.there, ctx.back = there, back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return linear(grad, ctx.back, ctx.there), None, None
