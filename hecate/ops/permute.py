"""Sort token copies by destination, restore their order, and sum them per token.

Shapes: T tokens, k experts per token, T * k token copies, N of which have an expert (usually all), d model width. Copy
`t * k + j` is token t for its j-th expert. `order [N]` lists copies in their new order, `inverse [T * k]` inverts it,
with N for copies without an expert; both int64. Forward and backward use only gathers, writes to distinct rows and sums
over k in ascending order, so results are deterministic bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hecate.ops.kernels import registered as kernels
from hecate.ops.registry import register

__all__ = ["block_order", "combine", "invert", "sort_by_expert", "sum_copies", "take_copies"]

BLOCK = 1 << 22
"""Elements of the largest temporary tensor of a sum over copies: 16 MiB in float32."""


def sort_by_expert(index: Tensor, num_experts: int) -> Tensor:
    """All copies sorted by expert, int64 `[T * k]`: first those without one; those of one expert keep their order.

    Args:
        index: `[T, k]`, the expert of each copy; -1: none.
        num_experts: E. The sort takes fewer passes over keys of 16 bits.
    """
    keys = index.flatten().to(torch.int16 if num_experts < 2**15 else torch.int32)
    return torch.sort(keys, stable=True).indices


def invert(order: Tensor, copies: int | None = None, absent: int | None = None) -> Tensor:
    """The inverse of int64 `order [N]`: the position in it of each of `copies` (default N).

    `absent` (default N) stands for copies that are not in it.
    """
    present = order.numel()
    inverse = order.new_full((present if copies is None else copies,), present if absent is None else absent)
    return inverse.scatter_(0, order, torch.arange(present, device=order.device))


def block_order(blocks: Tensor, rows: int) -> Tensor:
    """The permutation of rows that reorders consecutive blocks of rows, without synchronizing with the device.

    Args:
        blocks: int64 `[2, B]`, for each block in the new order how far behind the new place of its rows their old place
            is, and its number of rows.
        rows: number of rows of all blocks.

    Returns:
        int64 `[rows]`, the old row numbers in the new order.
    """
    shift = torch.repeat_interleave(blocks[0], blocks[1], output_size=rows)
    return shift.add_(torch.arange(rows, device=blocks.device))


def combine(rows: Tensor, weights: Tensor, inverse: Tensor, by_kernels: bool = False) -> Tensor:
    """Weighted sum of each token's rows, added in order of k; differentiable in rows and weights, also twice.

    Products and sums are in float32, or in the wider dtype of the two if that is wider. No tensor of shape `[T, k, d]`
    is made in that dtype, neither here nor in backward.

    Args:
        rows: `[N, d]`; row `inverse[t * k + j]` is the j-th of token t, a row of zeros if that is N (or, with
            `by_kernels`, negative).
        weights: `[T, k]`.
        inverse: int64 `[T * k]`.
        by_kernels: run Hecate's kernels. They add in float32, to which the weights are cast; rows must be float32 or
            narrower.

    Returns:
        `[T, d]` in the dtype of `rows`.
    """
    return _Combine.apply(rows, weights.float() if by_kernels else weights, inverse, by_kernels)


# Ops that do not differentiate.


def _take_copies(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    return x.index_select(0, order if top_k == 1 else order // top_k)


take_copies = register(
    "take_copies(Tensor x, Tensor order, int top_k) -> Tensor",
    _take_copies,
    lambda x, order, top_k: x.new_empty(order.shape[0], x.shape[1]),
)
"""Copies of the tokens `x [T, d]` in the given order, `out[p] = x[order[p] // top_k]`, `[N, d]`, without autograd."""


def _sum_copies(rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    rows = _padded(rows, inverse)
    if top_k == 1:
        return rows.index_select(0, inverse)
    tokens, width = inverse.shape[0] // top_k, rows.shape[1]
    out = rows.new_empty(tokens, width)
    for first, last in _blocks(tokens, top_k * width):
        copies = _taken(rows, inverse[first * top_k : last * top_k], top_k, rows.dtype)
        torch.sum(copies, 1, out=out[first:last])
    return out


sum_copies = register(
    "sum_copies(Tensor rows, Tensor inverse, int top_k) -> Tensor",
    _sum_copies,
    lambda rows, inverse, top_k: rows.new_empty(inverse.shape[0] // top_k, rows.shape[1]),
)
"""The sum of each token's rows, `[N, d]` to `[T, d]`, without autograd: the transpose of `take_copies`."""


def _combine(rows: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    (tokens, top_k), width = weights.shape, rows.shape[1]
    factors = weights.to(_sum_dtype(rows, weights)).unsqueeze(-1)
    rows, out = _padded(rows, inverse), rows.new_empty(tokens, width)
    for first, last in _blocks(tokens, top_k * width):
        copies = _taken(rows, inverse[first * top_k : last * top_k], top_k, factors.dtype)
        out[first:last] = copies.mul_(factors[first:last]).sum(1)
    return out


_combine_op = register(
    "combine(Tensor rows, Tensor weights, Tensor inverse) -> Tensor",
    _combine,
    lambda rows, weights, inverse: rows.new_empty(weights.shape[0], rows.shape[1]),
)


def _combine_backward(grad: Tensor, rows: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    (tokens, top_k), width = weights.shape, rows.shape[1]
    dtype, present = _sum_dtype(rows, weights), rows.shape[0]
    rows = _padded(rows, inverse)
    to_rows, to_weights = torch.empty_like(rows), torch.empty_like(weights)
    for first, last in _blocks(tokens, top_k * width):
        places = inverse[first * top_k : last * top_k]
        of_token = grad[first:last].to(dtype).unsqueeze(1)
        scaled = (of_token * weights[first:last].unsqueeze(-1)).to(rows.dtype)
        to_rows.index_copy_(0, places, scaled.view(-1, width))
        to_weights[first:last] = _taken(rows, places, top_k, dtype).mul_(of_token).sum(2)
    return to_rows[:present], to_weights


_combine_backward_op = register(
    "combine_backward(Tensor grad, Tensor rows, Tensor weights, Tensor inverse) -> (Tensor, Tensor)",
    _combine_backward,
    lambda grad, rows, weights, inverse: (torch.empty_like(rows), torch.empty_like(weights)),
)


def _taken(rows: Tensor, places: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """`[T, k, d]` in `dtype`: the rows at `places`, in memory of their own."""
    return rows.index_select(0, places).view(-1, top_k, rows.shape[1]).to(dtype)


def _padded(rows: Tensor, inverse: Tensor) -> Tensor:
    """`rows [N, d]`, with a row of zeros behind the last if some copies have no expert."""
    return rows if rows.shape[0] == inverse.shape[0] else torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _sum_dtype(rows: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)


def _blocks(tokens: int, per_token: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // max(1, per_token))
    return ((first, min(first + step, tokens)) for first in range(0, tokens, step))


# Their derivatives. Each function is linear in every argument, so its derivatives are again functions of this file.


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, inverse: Tensor, by_kernels: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, weights, inverse)
        ctx.by_kernels = by_kernels
        if by_kernels:
            return kernels.combine_rows(rows, inverse, weights, weights.shape[1])
        return _combine_op(rows, weights, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return *_CombineBackward.apply(grad, *ctx.saved_tensors, ctx.by_kernels), None, None


class _CombineBackward(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, grad: Tensor, rows: Tensor, weights: Tensor, inverse: Tensor, by_kernels: bool
    ):
        ctx.save_for_backward(grad, rows, weights, inverse)
        ctx.by_kernels = by_kernels
        backward = kernels.combine_backward if by_kernels else _combine_backward_op
        return backward(grad, rows, weights, inverse)

    @staticmethod
    def backward(ctx, to_rows: Tensor, to_weights: Tensor):  # type: ignore[no-untyped-def]
        grad, rows, weights, inverse = ctx.saved_tensors
        by = ctx.by_kernels
        to_grad = combine(to_rows, weights, inverse, by) + combine(rows, to_weights, inverse, by)
        return to_grad, *_CombineBackward.apply(grad, to_rows, to_weights, inverse, by), None, None
