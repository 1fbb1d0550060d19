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
from hecate.ops.upload import upload

__all__ = ["Groups", "LowRankSum", "grouped_bias", "grouped_linear", "not_in_one_call"]


@dataclass(frozen=True)
class Groups:
    """The groups of rows sorted by expert.

    Attributes:
        known_sizes: rows per group, on the host; groups may be empty. None: only the device knows, and rows behind the
            last group's end have no meaning, neither before nor after a product: nothing may be summed over them.
        ends: int32 `[G]`, exclusive end of each group, on the device of the rows.
        kernels: whether Hecate's kernels run on the rows, where there is one; see `hecate.ops.activation`.
        gemm: what multiplies rows with weights: "torch", or "sonicmoe" (`hecate.ops.sonicmoe`) for whole gated MLPs.
    """

    known_sizes: tuple[int, ...] | None
    ends: Tensor
    kernels: bool = False
    gemm: str = "torch"

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device, kernels: bool = False, gemm: str = "torch") -> Groups:
        """Groups with `sizes` rows each; copies to an accelerator without synchronizing with it."""
        ends = torch.from_numpy(np.cumsum(np.array(sizes, dtype=np.int64)).astype(np.int32))
        return cls(tuple(sizes), upload(ends, device), kernels, gemm)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows per group; RuntimeError if only the device knows them."""
        if self.known_sizes is None:
            raise RuntimeError(
                'Groups.sizes: with FSSDPConfig.splits="device" the host does not know the rows per expert; use '
                'Groups.ends, or splits="host"'
            )
        return self.known_sizes

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class LowRankSum:
    """The matrices `weight + scale * left @ right`; they are not computed, `grouped_linear` multiplies by each term.

    Attributes:
        weight: `[G, o, i]`; itself such a sum if there are several products.
        left: `[G, o, r]`.
        right: `[G, r, i]`.
        scale: a factor.
    """

    weight: Tensor | LowRankSum
    left: Tensor
    right: Tensor
    scale: float

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def transpose(self, dim0: int, dim1: int) -> LowRankSum:
        """The transposed matrices; only for the last two dimensions."""
        if {dim0 % 3, dim1 % 3} != {1, 2}:
            raise ValueError(f"LowRankSum.transpose({dim0}, {dim1}): must be (1, 2), which transposes the matrices")
        swapped = (self.weight.transpose(1, 2), self.right.transpose(1, 2), self.left.transpose(1, 2))
        return LowRankSum(*swapped, self.scale)


def grouped_linear(x: Tensor, weight: Tensor | LowRankSum, groups: Groups) -> Tensor:
    """`y[n] = weight[g(n)] @ x[n]` for rows sorted by group; differentiable in `x` and `weight`.

    Args:
        x: `[N, i]`.
        weight: `[G, o, i]`, same dtype; a group without rows gets a zero gradient.
        groups: N rows in G groups.

    Returns:
        `[N, o]`.
    """
    _check(x, weight, groups)
    if isinstance(weight, LowRankSum):
        low = grouped_linear(grouped_linear(x, weight.right, groups), weight.left, groups)
        return torch.add(grouped_linear(x, weight.weight, groups), low, alpha=weight.scale)
    return _GroupedLinear.apply(x, weight, groups.ends, groups.known_sizes or ())


def _check(x: Tensor, weight: Tensor | LowRankSum, groups: Groups) -> None:
    rows = x.shape[0] if groups.known_sizes is None else groups.num_rows
    if weight.shape[0] != groups.ends.numel() or x.shape[0] != rows:
        raise ValueError(
            f"grouped_linear: weight has {weight.shape[0]} groups and x {x.shape[0]} rows, "
            f"groups say {groups.ends.numel()} and {rows}"
        )


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


GROUPED_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def not_in_one_call(device_type: str, dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> str | None:
    """Why torch does not multiply all experts by weights of these shapes in one call; None: it does.

    Args:
        device_type: "cuda" or "cpu".
        dtype: of rows and weights.
        shapes: of one expert's weights; those with one dimension are biases, whose gradients need a sum per expert.
    """
    if (known := GROUPED_DTYPES.get(device_type)) != dtype:
        return f"computes in {dtype}, in which torch has no product of all experts on {device_type}; must be {known}"
    unit = 16 // dtype.itemsize
    for shape in shapes:
        if len(shape) != 2 or any(n % unit for n in shape):
            return f"has weights {list(shape)} per expert; must be matrices with widths that are multiples of {unit}"
    return None


def _in_one_call(x: Tensor, other: Tensor, other_width: int) -> bool:
    # torch's grouped kernel, if rows and experts are multiples of 16 bytes apart. On CUDA it has tensor cores for bf16.
    # On CPU it takes no float64; for float32 it needs 1.0 to 0.8 of the time of one product per expert (torch 2.13).
    unit = 16 // x.element_size()
    aligned = not any(n % unit for n in (x.shape[1], other_width, other.stride(0)))
    return GROUPED_DTYPES.get(x.device.type) == x.dtype and x.shape[0] > 0 and x.is_contiguous() and aligned


def _check_known(what: str, x: Tensor, other: Tensor, ends: Tensor, sizes: Sequence[int]) -> None:
    """RuntimeError if a product per group is needed, and the host does not know the groups."""
    if ends.numel() != len(sizes):
        raise RuntimeError(
            f'{what}: with FSSDPConfig.splits="device" one call must multiply all experts, which torch cannot for '
            f"{x.dtype} {tuple(x.shape)} and {tuple(other.shape)} on {x.device.type}: it takes "
            f"{GROUPED_DTYPES.get(x.device.type)} and widths that are multiples of 16 bytes"
        )


# Ops that do not differentiate. `sizes` is empty if only the device knows the groups.


def _linear(x: Tensor, weight: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    if not x.shape[0] or not weight.shape[0]:
        return x.new_zeros(x.shape[0], weight.shape[1])
    if _in_one_call(x, weight, weight.shape[1]):
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    _check_known("grouped_linear", x, weight, ends, sizes)
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
    if not x.shape[0] or not ends.shape[0]:
        return x.new_zeros(ends.shape[0], grad.shape[1], x.shape[1])
    if _in_one_call(x, grad, grad.shape[1]):
        out = torch.nn.functional.grouped_mm(grad.t(), x, offs=ends)
        # On some GPUs (Blackwell: pytorch#172439) torch leaves memory as it was for a group without rows.
        if len(sizes) == ends.numel():
            empty = [g for g, size in enumerate(sizes) if not size]
            return out.index_fill_(0, upload(torch.tensor(empty), out.device), 0) if empty else out
        return out.masked_fill_((torch.diff(ends, prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    _check_known("grouped_linear, backward", x, grad, ends, sizes)
    out = x.new_empty(len(sizes), grad.shape[1], x.shape[1])
    for g, rows, w in zip(grad.split(list(sizes)), x.split(list(sizes)), out, strict=True):
        torch.mm(g.t(), rows, out=w)
    return out


_weight_grad_op = register(
    "grouped_weight_grad(Tensor grad, Tensor x, Tensor ends, int[] sizes) -> Tensor",
    _weight_grad,
    lambda grad, x, ends, sizes: x.new_empty(ends.shape[0], grad.shape[1], x.shape[1]),
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
