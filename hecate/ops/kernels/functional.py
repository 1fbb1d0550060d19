"""The kernels as `torch.library` ops: with autograd, and known to `torch.compile` and FakeTensor.

Shapes: T tokens, k experts per token, M rows, d width. `inverse` int64 `[T * k]` is the row of each token copy,
negative if it has none. Results have the bits of the kernels: the sums over k add in ascending order.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from hecate.ops.kernels import activations, rows
from hecate.ops.kernels.activations import Activation

__all__ = ["activate", "combine", "gather", "scatter"]


def scatter(x: Tensor, inverse: Tensor, top_k: int, num_rows: int) -> Tensor:
    """`out[inverse[t * k + j]] = x[t]`: `x [T, d]` to `[M, d]`; every row must be some copy's. Differentiable twice."""
    return torch.ops.hecate.scatter_rows(x, inverse, top_k, num_rows)


def gather(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`out[q] = x[index[q]]` for int64 permutations of M rows, each the inverse of the other. Differentiable twice."""
    return torch.ops.hecate.gather_rows(x, index, inverse)


def combine(x: Tensor, weights: Tensor | None, inverse: Tensor, top_k: int) -> Tensor:
    """The weighted sum of each token's rows in float32, cast once: `x [M, d]` to `[T, d]`.

    Args:
        x: rows; every one must be some copy's.
        weights: float32 `[T, k]`; None: all 1, and then it is differentiable twice.
        inverse: int64 `[T * k]`.
        top_k: k.
    """
    return torch.ops.hecate.combine_rows(x, weights, inverse, top_k)


def activate(x: Tensor, kind: Activation, gated: bool) -> Tensor:
    """`act(x)`, or gated `act(x[:, :f]) * x[:, f:]`; see `hecate.ops.kernels.activations`."""
    return torch.ops.hecate.activate(x, kind, gated)


def _rows(x: Tensor) -> Tensor:
    """X with contiguous rows; gradients come with any strides, such as those of `expand`."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("hecate::scatter_rows", mutates_args=())
def _scatter(x: Tensor, inverse: Tensor, top_k: int, num_rows: int) -> Tensor:
    return rows.scatter_rows(_rows(x), inverse, top_k, num_rows)


@_scatter.register_fake
def _(x: Tensor, inverse: Tensor, top_k: int, num_rows: int) -> Tensor:
    return x.new_empty(num_rows, x.shape[1])


def _save_scatter(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, inverse, ctx.top_k, _ = inputs
    ctx.save_for_backward(inverse)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (inverse,) = ctx.saved_tensors
    return combine(grad, None, inverse, ctx.top_k), None, None, None


_scatter.register_autograd(_scatter_backward, setup_context=_save_scatter)


@torch.library.custom_op("hecate::gather_rows", mutates_args=())
def _gather(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return rows.gather_rows(_rows(x), index)


@_gather.register_fake
def _(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _save_gather(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return gather(grad, inverse, index), None, None


_gather.register_autograd(_gather_backward, setup_context=_save_gather)


@torch.library.custom_op("hecate::combine_rows", mutates_args=())
def _combine(x: Tensor, weights: Tensor | None, inverse: Tensor, top_k: int) -> Tensor:
    return rows.combine_rows(_rows(x), inverse, None if weights is None else weights.contiguous(), top_k)


@_combine.register_fake
def _(x: Tensor, weights: Tensor | None, inverse: Tensor, top_k: int) -> Tensor:
    return x.new_empty(inverse.shape[0] // top_k, x.shape[1])


@torch.library.custom_op("hecate::combine_rows_backward", mutates_args=())
def _combine_grads(
    grad: Tensor, x: Tensor, weights: Tensor, inverse: Tensor, want_rows: bool, want_weights: bool
) -> tuple[Tensor, Tensor]:
    want = (want_rows, want_weights)
    grad_rows, grad_weights = rows.combine_backward(_rows(grad), _rows(x), inverse, weights.contiguous(), want)
    return _or_nothing(grad_rows, x), _or_nothing(grad_weights, weights)


@_combine_grads.register_fake
def _(
    grad: Tensor, x: Tensor, weights: Tensor, inverse: Tensor, want_rows: bool, want_weights: bool
) -> tuple[Tensor, Tensor]:
    return _or_nothing(x if want_rows else None, x), _or_nothing(weights if want_weights else None, weights)


def _or_nothing(shape_of: Tensor | None, like: Tensor) -> Tensor:
    """An op cannot return None: an empty tensor stands for it."""
    if shape_of is None:
        return like.new_empty(0)
    return shape_of if shape_of is not like else torch.empty_like(like, memory_format=torch.contiguous_format)


def _save_combine(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weights, inverse, ctx.top_k = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(inverse) if weights is None else ctx.save_for_backward(inverse, x, weights)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    inverse, *weighted = ctx.saved_tensors
    if not weighted:
        return scatter(grad, inverse, ctx.top_k, ctx.num_rows), None, None, None
    x, weights = weighted
    want = ctx.needs_input_grad[:2]
    grad_rows, grad_weights = torch.ops.hecate.combine_rows_backward(grad, x, weights, inverse, *want)
    return grad_rows if want[0] else None, grad_weights if want[1] else None, None, None


_combine.register_autograd(_combine_backward, setup_context=_save_combine)


@torch.library.custom_op("hecate::activate", mutates_args=())
def _activate(x: Tensor, kind: str, gated: bool) -> Tensor:
    return activations.activate(_rows(x), _known(kind), gated)


@_activate.register_fake
def _(x: Tensor, kind: str, gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // (2 if gated else 1))


@torch.library.custom_op("hecate::activate_backward", mutates_args=())
def _activate_grad(grad: Tensor, x: Tensor, kind: str, gated: bool) -> Tensor:
    return activations.activate_backward(_rows(grad), _rows(x), _known(kind), gated)


@_activate_grad.register_fake
def _(grad: Tensor, x: Tensor, kind: str, gated: bool) -> Tensor:
    return x.new_empty(x.shape)


def _known(kind: str) -> Activation:
    for known in get_args(Activation):
        if kind == known:
            return known
    raise ValueError(f"activation {kind!r} must be one of {', '.join(get_args(Activation))}")


def _save_activate(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, ctx.kind, ctx.gated = inputs
    ctx.save_for_backward(x)


def _activate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    return torch.ops.hecate.activate_backward(grad, x, ctx.kind, ctx.gated), None, None


_activate.register_autograd(_activate_backward, setup_context=_save_activate)
