"""Copies of tokens as the runtime makes them, in one function that autograd differentiates."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hecate.ops.linear import linear
from hecate.ops.permute import sum_copies, take_copies

__all__ = ["permute"]


def permute(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Copies of the tokens `x [T, d]` in the given order: `out[p] = x[order[p] // top_k]`, `[N, d]`."""
    return linear(x, lambda x: partial(take_copies, x, order, top_k), lambda x: partial(sum_copies, x, inverse, top_k))
