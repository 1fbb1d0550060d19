"""Activations of expert MLPs on the rows of a grouped product, forward and backward.

Shapes: N rows, f hidden width. Gated rows are `[N, 2 f]`: the half that is activated, then the half it multiplies.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hecate.ops.kernels.launch import ThreadOrder, aligned, check_rows, dtype_name, row_launch, run

__all__ = ["Activation", "activate", "activate_backward"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
"""silu with a gate is SwiGLU; gelu is the exact one, by erf; relu2 is relu squared."""


def activate(x: Tensor, kind: Activation, gated: bool, order: ThreadOrder = "ascending") -> Tensor:
    """`act(x)`, or gated `act(x[:, :f]) * x[:, f:]`; `[N, f]`.

    Computed in float32; the activation is rounded to the dtype of x before the product, as PyTorch does.

    Args:
        x: `[N, f]`, gated `[N, 2 f]`; float32, bfloat16 or float16, rows contiguous.
        kind: the activation.
        gated: whether x has two halves.
        order: of emulated threads.
    """
    width = _width("activate", x, gated)
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    vectors = _vectors(x, gated, out)
    args = (x, x.stride(0), out, *out.shape, _number(kind), gated, vectors)
    name = f"activate_{dtype_name('activate', x.dtype)}"
    run(row_launch("activation", name, x.shape[0], width, x.element_size(), args, x.device), x.device, order)
    return out


def activate_backward(
    grad: Tensor, x: Tensor, kind: Activation, gated: bool, order: ThreadOrder = "ascending"
) -> Tensor:
    """The gradient of `activate` in x, of its shape, from the gradient `[N, f]` of its result."""
    width = _width("activate_backward", x, gated)
    check_rows("activate_backward: grad", grad)
    if grad.dtype != x.dtype or grad.shape != (x.shape[0], width):
        raise ValueError(
            f"activate_backward: grad {grad.dtype} {tuple(grad.shape)}, must be {x.dtype} {(x.shape[0], width)}"
        )
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vectors = _vectors(x, gated, grad, grad_x)
    args = (grad, grad.stride(0), x, x.stride(0), grad_x, x.shape[0], width, _number(kind), gated, vectors)
    name = f"activate_backward_{dtype_name('activate_backward', x.dtype)}"
    run(row_launch("activation", name, x.shape[0], width, x.element_size(), args, x.device), x.device, order)
    return grad_x


def _width(what: str, x: Tensor, gated: bool) -> int:
    check_rows(f"{what}: x", x)
    if gated and x.shape[1] % 2:
        raise ValueError(f"{what}: gated rows have {x.shape[1]} columns, must be an even number")
    return x.shape[1] // (2 if gated else 1)


def _vectors(x: Tensor, gated: bool, *others: Tensor) -> bool:
    """Whether 16-byte accesses are possible, also to the second half of gated rows."""
    half = x[:, x.shape[1] // 2 :] if gated else x
    return aligned(x, half, *others) and (not gated or x.shape[1] // 2 * x.element_size() % 16 == 0)


def _number(kind: Activation) -> int:
    kinds = get_args(Activation)
    if kind not in kinds:
        raise ValueError(f"activation {kind!r} must be one of {', '.join(kinds)}")
    return kinds.index(kind)
