"""Rows of tokens to where they are sent, received rows to their experts, and the weighted sum of results.

Shapes: T tokens, k experts per token, M rows, d width. `inverse` int64 `[T * k]` is the row of each token copy; it has
none if that is outside [0, M).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.ops.kernels.launch import (
    ThreadOrder,
    aligned,
    cast_name,
    check_rows,
    dtype_name,
    row_block,
    row_launch,
    run,
)

__all__ = ["OwnRows", "combine_backward", "combine_rows", "gather_rows", "scatter_rows"]

_CHOICES = 8  # kChoices in csrc/cuda/combine.cuh


@dataclass(frozen=True)
class OwnRows:
    """Rows that do not leave this device: read where they are, not rounded to the dtype of the wire.

    Attributes:
        rows: `[*, d]`, in the dtype of the result.
        index: int64 `[end - begin]`: wire row r is `rows[index[r - begin] // top_k]`.
        begin, end: their place among the wire rows.
        top_k: copies per row of `rows`.
    """

    rows: Tensor
    index: Tensor
    begin: int
    end: int
    top_k: int = 1


def scatter_rows(
    x: Tensor,
    inverse: Tensor,
    top_k: int,
    num_rows: int,
    dtype: torch.dtype | None = None,
    skip: tuple[int, int] = (0, 0),
    order: ThreadOrder = "ascending",
) -> Tensor:
    """`out[inverse[t * k + j]] = x[t]`, cast; every row that is not skipped must be some copy's.

    Args:
        x: `[T, d]`, rows contiguous.
        inverse: int64 `[T * k]`.
        top_k: k.
        num_rows: M.
        dtype: of the result; None: that of x.
        skip: range of rows that are not written.
        order: of emulated threads.

    Returns:
        `[M, d]`.
    """
    check_rows("scatter_rows: x", x)
    out = torch.empty(num_rows, x.shape[1], dtype=dtype or x.dtype, device=x.device)
    sizes = (x.shape[0], top_k, x.shape[1], num_rows, *skip, aligned(x, out))
    args = (x, x.stride(0), inverse, out, *sizes)
    kernel = f"scatter_{cast_name('scatter_rows', x.dtype, out.dtype)}"
    itemsize = max(x.element_size(), out.element_size())
    run(row_launch("permute", kernel, x.shape[0], x.shape[1], itemsize, args, x.device), x.device, order)
    return out


def gather_rows(
    x: Tensor,
    index: Tensor,
    dtype: torch.dtype | None = None,
    own: OwnRows | None = None,
    order: ThreadOrder = "ascending",
) -> Tensor:
    """`out[q] = x[index[q]]`, cast; `[M, d]`.

    Args:
        x: wire rows `[*, d]`, rows contiguous.
        index: int64 `[M]`.
        dtype: of the result; None: that of x.
        own: wire rows that are read from elsewhere.
        order: of emulated threads.
    """
    check_rows("gather_rows: x", x)
    out = torch.empty(index.numel(), x.shape[1], dtype=dtype or x.dtype, device=x.device)
    _check_own("gather_rows", own, out)
    local = (None, 0, None, 0, 0, 1) if own is None else _own_args(own)
    rows = None if own is None else own.rows
    moved, width = out.shape
    args = (x, x.stride(0), index, out, moved, width, *local, aligned(x, out, rows))
    kernel = f"gather_{cast_name('gather_rows', x.dtype, out.dtype)}"
    itemsize = max(x.element_size(), out.element_size())
    run(row_launch("permute", kernel, moved, width, itemsize, args, x.device), x.device, order)
    return out


def combine_rows(
    rows: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    top_k: int,
    dtype: torch.dtype | None = None,
    own: OwnRows | None = None,
    order: ThreadOrder = "ascending",
) -> Tensor:
    """`out[t]` = sum over j, ascending, of `weights[t, j] * rows[inverse[t * k + j]]` in float32, cast once; `[T, d]`.

    Args:
        rows: wire rows `[M, d]`, contiguous.
        inverse: int64 `[T * k]`.
        weights: float32 `[T, k]`, contiguous; None: all 1.
        top_k: k.
        dtype: of the result; None: that of the rows.
        own: wire rows that are read from elsewhere, contiguous; its `top_k` must be 1.
        order: of emulated threads.
    """
    check_rows("combine_rows: rows", rows)
    rows = rows.contiguous()
    tokens = inverse.numel() // max(1, top_k) if weights is None else weights.shape[0]
    _check_weights("combine_rows", weights, tokens, top_k)
    out = torch.empty(tokens, rows.shape[1], dtype=dtype or rows.dtype, device=rows.device)
    _check_own("combine_rows", own, out)
    local = (None, None, 0, 0) if own is None else (own.rows, own.index, own.begin, own.end)
    place = None if own is None else own.rows
    if own is not None and (own.top_k != 1 or not own.rows.is_contiguous()):
        raise ValueError(f"combine_rows: own rows with top_k={own.top_k}, must be contiguous with top_k=1")
    sizes = (tokens, top_k, rows.shape[1], rows.shape[0])
    args = (rows, inverse, weights, out, *sizes, *local, aligned(rows, out, place))
    kernel = f"combine_{dtype_name('combine_rows: rows', rows.dtype)}_{dtype_name('combine_rows', out.dtype)}"
    itemsize = max(rows.element_size(), out.element_size())
    run(row_launch("combine", kernel, tokens, rows.shape[1], itemsize, args, rows.device), rows.device, order)
    return out


def combine_backward(
    grad: Tensor,
    rows: Tensor,
    inverse: Tensor,
    weights: Tensor,
    order: ThreadOrder = "ascending",
) -> tuple[Tensor, Tensor]:
    """Gradients of `combine_rows` in its rows and its weights, in one pass.

    Args:
        grad: `[T, d]`, of the result.
        rows: `[M, d]`, contiguous, as they were combined.
        inverse: int64 `[T * k]`; every row must be some copy's.
        weights: float32 `[T, k]`, contiguous.
        order: of emulated threads.

    Returns:
        `[M, d]` in the dtype of the rows, and float32 `[T, k]`.
    """
    check_rows("combine_backward: grad", grad)
    check_rows("combine_backward: rows", rows)
    rows = rows.contiguous()
    tokens, top_k = weights.shape
    _check_weights("combine_backward", weights, grad.shape[0], top_k)
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    sizes = (tokens, top_k, *reversed(rows.shape), aligned(grad, rows, grad_rows))
    args: tuple[Tensor | int, ...] = (grad, grad.stride(0), rows, inverse, weights, grad_rows, grad_weights, *sizes)
    names = (dtype_name("combine_backward: rows", rows.dtype), dtype_name("combine_backward: grad", grad.dtype))
    itemsize = max(rows.element_size(), grad.element_size())
    width, height = row_block(rows.shape[1], 16 // itemsize)
    name, shared = "combine_backward_" + "_".join(names), 4 * _CHOICES * width * height
    launch = row_launch("combine", name, tokens, rows.shape[1], itemsize, args, rows.device, shared_bytes=shared)
    run(launch, rows.device, order)
    return grad_rows, grad_weights


def _own_args(own: OwnRows) -> tuple[Tensor | int, ...]:
    return own.rows, own.rows.stride(0), own.index, own.begin, own.end, own.top_k


def _check_own(what: str, own: OwnRows | None, out: Tensor) -> None:
    if own is None:
        return
    check_rows(f"{what}: own rows", own.rows)
    if own.rows.dtype != out.dtype:
        raise TypeError(f"{what}: own rows have {own.rows.dtype}, must have the dtype of the result, {out.dtype}")


def _check_weights(what: str, weights: Tensor | None, tokens: int, top_k: int) -> None:
    if weights is None:
        return
    if weights.dtype != torch.float32 or not weights.is_contiguous() or weights.shape != (tokens, top_k):
        raise ValueError(
            f"{what}: weights {weights.dtype} {tuple(weights.shape)}, must be contiguous torch.float32 "
            f"{(tokens, top_k)}"
        )
