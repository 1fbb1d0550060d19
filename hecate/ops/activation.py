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


def activation(x: Tensor, kind: Activation, gated: bool, by_kernels: bool) -> Tensor:
    """`act(x)`, or gated `act(x[:, :f]) * x[:, f:]`; `[N, f]`, differentiable any number of times.

    Args:
        x: `[N, f]`, gated `[N, 2 f]`.
        kind: the activation.
        gated: whether x has two halves.
        by_kernels: run Hecate's kernel, which reads and writes each row once; x must be float32 or bfloat16.
    """
    return _Activation.apply(x, kind, gated) if by_kernels else _plain(x, kind, gated)


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
        # create_graph=True: the kernel has no second derivative, PyTorch's operations have.
        out = _plain(x, ctx.kind, ctx.gated)
        return torch.autograd.grad(out, x, grad, create_graph=True)[0], None, None
