"""Activations of expert MLPs, plain or gated, by PyTorch's operations or by one of Hecate's kernels.

Shapes: N rows, f hidden width. Gated rows are `[N, 2 f]`: the half that is activated, then the half it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.ops.kernels import registered as kernels
from hecate.ops.kernels.activations import Activation

__all__ = ["activation"]

PLAIN: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


_gelu_backward = torch.ops.aten.gelu_backward.grad_input

BACKWARD_INTO: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "silu": lambda grad, x, out: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out),
    "gelu": lambda grad, x, out: _gelu_backward(grad, x, approximate="none", grad_input=out),
    "gelu_tanh": lambda grad, x, out: _gelu_backward(grad, x, approximate="tanh", grad_input=out),
    "relu": lambda grad, x, out: torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
}
"""PyTorch's own derivatives of `PLAIN`, written into `out`, which may be `grad` itself."""


def activation(x: Tensor, kind: Activation, gated: bool, by_kernels: bool) -> Tensor:
    """`act(x)`, or gated `act(x[:, :f]) * x[:, f:]`; `[N, f]`, differentiable any number of times.

    Without kernels, values and gradients have the bits of that formula in PyTorch.

    Args:
        x: `[N, f]`, gated `[N, 2 f]`.
        kind: the activation.
        gated: whether x has two halves.
        by_kernels: run Hecate's kernel, which reads and writes each row once; x must be float32 or bfloat16.
    """
    if by_kernels:
        return _Activation.apply(x, kind, gated)
    return _Gate.apply(x, kind) if gated and kind in BACKWARD_INTO else _plain(x, kind, gated)


def _plain(x: Tensor, kind: Activation, gated: bool) -> Tensor:
    if not gated:
        return PLAIN[kind](x)
    half, other = x.chunk(2, dim=-1)
    return PLAIN[kind](half) * other


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kind: Activation, gated: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.kind, ctx.gated = kind, gated
        return kernels.activate(x, kind, gated)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return kernels.activate_backward(grad, x, ctx.kind, ctx.gated), None, None
        return _differentiable(grad, x, ctx.kind, ctx.gated), None, None


class _Gate(torch.autograd.Function):
    """A gated activation whose backward pass writes both halves in place, where PyTorch concatenates them."""

    @staticmethod
    def forward(ctx, x: Tensor, kind: Activation) -> Tensor:  # type: ignore[no-untyped-def]
        half, other = x.chunk(2, dim=-1)
        activated = PLAIN[kind](half)
        ctx.save_for_backward(x, activated)
        ctx.kind = kind
        return activated * other

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, activated = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(grad, x, ctx.kind, gated=True), None
        half, other = x.chunk(2, dim=-1)
        to_half, to_other = (grad_x := torch.empty_like(x)).chunk(2, dim=-1)
        BACKWARD_INTO[ctx.kind](torch.mul(grad, other, out=to_half), half, to_half)
        torch.mul(grad, activated, out=to_other)
        return grad_x, None


def _differentiable(grad: Tensor, x: Tensor, kind: Activation, gated: bool) -> Tensor:
    # create_graph=True: what has no second derivative is done by PyTorch's operations, which have.
    return torch.autograd.grad(_plain(x, kind, gated), x, grad, create_graph=True)[0]
