"""Sort token copies by destination, and restore their order.

Shapes: T tokens, k experts per token, T * k token copies, N of which have an expert (usually all), d model width. Copy
`t * k + j` is token t for its j-th expert. `order [N]` lists copies in their new order, `inverse [T * k]` inverts it;
both int64. Copies without an expert are not in `order`. Forward and backward use only gathers, writes to distinct rows
and sums over k in ascending order, so results are deterministic bit by bit.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["block_order", "combine", "invert", "permute"]


def invert(order: Tensor, copies: int | None = None) -> Tensor:
    """The inverse of int64 `order [N]`: the position in it of each of `copies` (default N); N if it is not there."""
    inverse = order.new_full((order.numel() if copies is None else copies,), order.numel())
    return inverse.scatter_(0, order, torch.arange(order.numel(), device=order.device))


def block_order(sizes: ArrayLike, blocks: ArrayLike, device: torch.device) -> Tensor:
    """The permutation of rows that reorders consecutive blocks of rows.

    Args:
        sizes: rows per block, in the present order of the blocks.
        blocks: block numbers in the wanted order, a permutation.
        device: device of the result; building it does not synchronize with the device.

    Returns:
        int64 `[sum(sizes)]`, the present row numbers in the wanted order.
    """
    size = torch.from_numpy(np.array(sizes, dtype=np.int64))
    wanted = torch.from_numpy(np.array(blocks, dtype=np.int64))
    start = size.cumsum(0) - size
    moved = size[wanted]
    shift = start[wanted] - (moved.cumsum(0) - moved)
    table = torch.stack([shift, moved])
    if device.type != "cpu":
        table = table.pin_memory().to(device, non_blocking=True)
    rows = int(size.sum())
    return torch.repeat_interleave(table[0], table[1], output_size=rows) + torch.arange(rows, device=device)


def permute(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Copies of the tokens `x [T, d]` in the given order: `out[p] = x[order[p] // top_k]`, `[N, d]`."""
    return torch.ops.hecate.permute(x, order, inverse, top_k)


def combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Weighted sum of each token's rows: rows `[N, d]` and weights `[T, k]` to `[T, d]`; adds in order of k.

    Copies without an expert count as rows of zeros.
    """
    per_token = torch.ops.hecate.unpermute(rows, order, inverse)
    tokens, top_k = weights.shape
    per_token = per_token.view(tokens, top_k, rows.shape[1])
    return (per_token * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


@torch.library.custom_op("hecate::permute", mutates_args=())
def _permute(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return x.index_select(0, order if top_k == 1 else order // top_k)


@_permute.register_fake
def _(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@torch.library.custom_op("hecate::unpermute", mutates_args=())
def _unpermute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    if order.numel() == inverse.numel():
        return rows.index_select(0, inverse)
    return rows.new_zeros(inverse.shape[0], rows.shape[1]).index_copy_(0, order, rows)


@_unpermute.register_fake
def _(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return rows.new_empty(inverse.shape[0], rows.shape[1])


def _save_permute(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch.library's own signature
    _, order, inverse, ctx.top_k = inputs
    ctx.save_for_backward(order, inverse)


def _permute_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    order, inverse = ctx.saved_tensors
    per_copy = torch.ops.hecate.unpermute(grad, order, inverse)
    if ctx.top_k > 1:
        per_copy = per_copy.unflatten(0, (-1, ctx.top_k)).sum(1)
    return per_copy, None, None, None


def _save_unpermute(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, order, inverse = inputs
    ctx.save_for_backward(order, inverse)


def _unpermute_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    order, inverse = ctx.saved_tensors
    return torch.ops.hecate.permute(grad, order, inverse, 1), None, None


_permute.register_autograd(_permute_backward, setup_context=_save_permute)
_unpermute.register_autograd(_unpermute_backward, setup_context=_save_unpermute)
