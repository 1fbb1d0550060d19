"""The activation kernels, on the CPU, against torch's functions and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.ops.kernels.activations import Activation, activate, activate_backward
from tests.ops.kernels.shared import DTYPES, ORDERS, WIDTHS, matrix, same_bits

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
UNIT = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""A little more than the distance of neighbouring numbers, relative: the last bit of exp, erf and tanh may differ."""


def plain(x: Tensor, kind: Activation, gated: bool) -> Tensor:
    if not gated:
        return FUNCTIONS[kind](x)
    gate, up = x.chunk(2, dim=1)
    return FUNCTIONS[kind](gate) * up


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(FUNCTIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_against_torch(width: int, dtype: torch.dtype, kind: Activation, gated: bool) -> None:
    x = matrix(9, 2 * width if gated else width, dtype, misaligned=width == 64)
    grad = matrix(9, width, dtype, seed=1)
    wide = x.double().requires_grad_()
    expected = plain(wide, kind, gated)
    expected.backward(grad.double())
    assert wide.grad is not None
    close = {"rtol": UNIT[dtype], "atol": max(3e-4, 16 * UNIT[dtype])}  # 1 - tanh(8)^2 cancels, times rows up to 32
    torch.testing.assert_close(activate(x, kind, gated), expected.to(dtype), **close)
    torch.testing.assert_close(activate_backward(grad, x, kind, gated), wide.grad.to(dtype), **close)
    for order in ORDERS:
        same_bits(activate(x, kind, gated, order), activate(x, kind, gated))
        same_bits(activate_backward(grad, x, kind, gated, order), activate_backward(grad, x, kind, gated))


@pytest.mark.parametrize("kind", ["relu", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_where_torch_rounds(kind: Activation, dtype: torch.dtype) -> None:
    """Without exp and its like, forward and backward have the very bits of eager torch."""
    x = matrix(50, 64, dtype).requires_grad_()
    grad = matrix(50, 32, dtype, seed=1)
    gate, up = x.chunk(2, dim=1)
    if kind == "relu":
        out = F.relu(gate) * up
        out.backward(grad)
        same_bits(activate_backward(grad, x.detach(), kind, True), x.grad)
    else:
        out = (F.relu(gate.float()).square().to(dtype)) * up
    same_bits(activate(x.detach(), kind, True), out.detach())


def test_extreme_values() -> None:
    x = torch.tensor([[0.0, -0.0, 100.0, -100.0, float("inf"), float("nan"), -1e30, 1e30]])
    for kind in ("silu", "gelu", "relu"):
        one_by_one = torch.stack([FUNCTIONS[kind](value) for value in x[0]])  # torch's vectorized gelu(inf) is NaN
        torch.testing.assert_close(activate(x, kind, False)[0], one_by_one, equal_nan=True)
        grad = activate_backward(torch.ones_like(x), x[:, :4].repeat(1, 2), kind, False)
        assert grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    x = matrix(rows, 32, torch.bfloat16)
    assert activate(x, "silu", True).shape == (rows, 16)
    assert activate_backward(x[:, :16], x, "silu", True).shape == x.shape


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="gated rows have 7 columns, must be an even number"):
        activate(torch.zeros(2, 7), "silu", True)
    with pytest.raises(ValueError, match="activation 'swish' must be one of silu, gelu"):
        activate(torch.zeros(2, 8), "swish", True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grad torch.float32 \(2, 8\), must be torch.float32 \(2, 4\)"):
        activate_backward(torch.zeros(2, 8), torch.zeros(2, 8), "silu", True)
