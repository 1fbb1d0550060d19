"""Grouped matrix products: consecutive rows form groups, each multiplied with its own weight.

Shapes: N rows, G groups (experts), i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).to(torch.int32)
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
    return torch.ops.hecate.grouped_linear(x, weight, groups.ends, groups.sizes)


def grouped_bias(x: Tensor, bias: Tensor, groups: Groups) -> Tensor:
    """`y[n] = x[n] + bias[g(n)]` for rows sorted by group; differentiable in both, in a fixed order of summation.

    Args:
        x: `[N, o]`.
        bias: `[G, o]`, same dtype; a group without rows gets a zero gradient.
        groups: N rows in G groups.

    Returns:
        `[N, o]`.
    """
    return torch.ops.hecate.grouped_bias(x, bias, groups.ends, groups.sizes)


def _on_tensor_cores(x: Tensor, other_width: int) -> bool:
    # torch's grouped kernel is used for bf16 on CUDA, if rows are a multiple of 16 bytes. Otherwise one product per
    # expert is faster (measured on CPU: 60 against 41 GFLOP/s) or the only way.
    aligned = x.shape[1] % 8 == 0 and other_width % 8 == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0] > 0 and aligned


@torch.library.custom_op("hecate::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    if _on_tensor_cores(x, weight.shape[1]):
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out = x.new_empty(x.shape[0], weight.shape[1])
    for rows, w, y in zip(x.split(list(sizes)), weight, out.split(list(sizes)), strict=True):
        torch.mm(rows, w.t(), out=y)
    return out


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("hecate::grouped_weight_grad", mutates_args=())
def _grouped_weight_grad(grad: Tensor, x: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
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


@_grouped_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.new_empty(len(sizes), grad.shape[1], x.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch.library's own signature
    x, weight, ends, sizes = inputs
    ctx.save_for_backward(x, weight, ends)
    ctx.sizes = sizes


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hecate.grouped_linear(grad, weight.transpose(1, 2), ends, ctx.sizes)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.hecate.grouped_weight_grad(grad, x, ends, ctx.sizes)
    return grad_x, grad_weight, None, None


_grouped_linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("hecate::grouped_bias", mutates_args=())
def _grouped_bias(x: Tensor, bias: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    rows = torch.diff(ends, prepend=ends.new_zeros(1))
    return x + bias.repeat_interleave(rows, dim=0, output_size=x.shape[0])


@_grouped_bias.register_fake
def _(x: Tensor, bias: Tensor, ends: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def _bias_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    # The backward of repeat_interleave would add with atomics on CUDA, in no fixed order.
    grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_bias = grad.new_empty(len(ctx.sizes), grad.shape[1])
        for rows, row in zip(grad.split(list(ctx.sizes)), grad_bias, strict=True):
            torch.sum(rows, 0, out=row)
    return grad, grad_bias, None, None


def _save_sizes(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.sizes = inputs[3]


_grouped_bias.register_autograd(_bias_backward, setup_context=_save_sizes)
