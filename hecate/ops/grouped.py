"""Grouped matrix products: consecutive rows form groups, each multiplied with its own weight.

Shapes: N rows, G groups (experts), i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hecate.ops.registry import register

__all__ = ["Groups", "grouped_bias", "grouped_linear"]


@dataclass(frozen=True)
class Groups:
    """The groups of rows sorted by expert.

    Attributes:
        sizes: rows per group, on the host; groups may be empty.
        ends: int32 `[G]`, exclusive end of each group, on the device of the rows.
    """

    sizes: tuple[int, ...]
    ends: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Groups:
        """Groups with `sizes` rows each; copies to an accelerator without synchronizing with it."""
        ends = torch.from_numpy(np.cumsum(np.array(sizes, dtype=np.int64)).astype(np.int32))
        if device.type != "cpu":
            ends = ends.pin_memory().to(device, non_blocking=True)
        return cls(tuple(sizes), ends)

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """`y[n] = weight[g(n)] @ x[n]` for rows sorted by group; differentiable in `x` and `weight`.

    Args:
        x: `[N, i]`.
        weight: `[G, o, i]`, same dtype; a group without rows gets a zero gradient.
        groups: N rows in G groups.

    Returns:
        `[N, o]`.
    """
    if weight.shape[0] != len(groups.sizes) or x.shape[0] != groups.num_rows:
        raise ValueError(
            f"grouped_linear: weight has {weight.shape[0]} groups and x {x.shape[0]} rows, "
            f"groups say {len(groups.sizes)} and {groups.num_rows}"
        )
    return _GroupedLinear.apply(x, weight, groups.ends, groups.sizes)


def grouped_bias(x: Tensor, bias: Tensor, groups: Groups) -> Tensor:
    """`y[n] = x[n] + bias[g(n)]` for rows sorted by group; differentiable in both, in a fixed order of summation.

    Args:
        x: `[N, o]`.
        bias: `[G, o]`, same dtype; a group without rows gets a zero gradient.
        groups: N rows in G groups.

    Returns:
        `[N, o]`.
    """
    return x + _Spread.apply(bias, groups.ends, groups.sizes)


def _on_tensor_cores(x: Tensor, other_width: int) -> bool:
    # torch's grouped kernel is used for bf16 on CUDA, if rows are a multiple of 16 bytes. Otherwise one product per
    # expert is faster (measured on CPU: 60 against 41 GFLOP/s) or the only way.
    aligned = x.shape[1] % 8 == 0 and other_width % 8 == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0] > 0 and aligned


# Ops that do not differentiate.


def _linear(x: Tensor, weight: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    if _on_tensor_cores(x, weight.shape[1]):
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out = x.new_empty(x.shape[0], weight.shape[1])
    for rows, w, y in zip(x.split(list(sizes)), weight, out.split(list(sizes)), strict=True):
        torch.mm(rows, w.t(), out=y)
    return out


_linear_op = register(
    "grouped_linear(Tensor x, Tensor weight, Tensor ends, int[] sizes) -> Tensor",
    _linear,
    lambda x, weight, ends, sizes: x.new_empty(x.shape[0], weight.shape[1]),
)


def _weight_grad(grad: Tensor, x: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    """`[G, o, i]`: the sum of `grad[n] x[n]^T` over the rows of each group; zeros for a group without rows."""
    if _on_tensor_cores(x, grad.shape[1]):
        out = torch.nn.functional.grouped_mm(grad.t(), x, offs=ends)
        # On some GPUs (Blackwell: pytorch#172439) torch leaves memory as it was for a group without rows.
        filled = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
        return torch.where(filled[:, None, None], out, 0)
    out = x.new_empty(len(sizes), grad.shape[1], x.shape[1])
    for g, rows, w in zip(grad.split(list(sizes)), x.split(list(sizes)), out, strict=True):
        torch.mm(g.t(), rows, out=w)
    return out


_weight_grad_op = register(
    "grouped_weight_grad(Tensor grad, Tensor x, Tensor ends, int[] sizes) -> Tensor",
    _weight_grad,
    lambda grad, x, ends, sizes: x.new_empty(len(sizes), grad.shape[1], x.shape[1]),
)
"""`[G, o, i]`: the sum of `grad[n] x[n]^T` over the rows of each group."""


def _group_sums(rows: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    out = rows.new_empty(len(sizes), rows.shape[1])
    for of_group, row in zip(rows.split(list(sizes)), out, strict=True):
        torch.sum(of_group, 0, out=row)
    return out


# Their derivatives. Each function is linear in every tensor, so that its derivatives are again functions of this file.


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, ends)
        ctx.sizes = sizes
        return _linear_op(x, weight, ends, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = _GroupedLinear.apply(grad, weight.transpose(1, 2), ends, ctx.sizes)
        if ctx.needs_input_grad[1]:
            to_weight = _WeightGrad.apply(grad, x, ends, ctx.sizes)
        return to_x, to_weight, None, None


class _WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor, x: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(grad, x, ends)
        ctx.sizes = sizes
        return _weight_grad_op(grad, x, ends, sizes)

    @staticmethod
    def backward(ctx, weight: Tensor):  # type: ignore[no-untyped-def]
        grad, x, ends = ctx.saved_tensors
        to_grad = _GroupedLinear.apply(x, weight, ends, ctx.sizes)
        to_x = _GroupedLinear.apply(grad, weight.transpose(1, 2), ends, ctx.sizes)
        return to_grad, to_x, None, None


class _Spread(torch.autograd.Function):
    """From one row per group `[G, o]` to one per row of the groups `[N, o]`.

    torch's own backward of repeat_interleave would add with atomics on CUDA, in no fixed order.
    """

    @staticmethod
    def forward(ctx, of_group: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ends)
        ctx.sizes = sizes
        rows = torch.diff(ends, prepend=ends.new_zeros(1))
        return of_group.repeat_interleave(rows, dim=0, output_size=sum(sizes))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _GroupSums.apply(grad, *ctx.saved_tensors, ctx.sizes), None, None


class _GroupSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ends)
        ctx.sizes = sizes
        return _group_sums(rows, ends, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _Spread.apply(grad, *ctx.saved_tensors, ctx.sizes), None, None
