"""Sums over the copies of a token: the same bits in blocks of tokens as at once, and no large temporary tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hecate.ops import permute as ops
from hecate.ops.permute import combine, invert
from tests.ops.copies import permute

TOKENS, TOP_K, WIDTH = 13, 3, 5
BF16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
DTYPES = [(FLOAT64, FLOAT64), (FLOAT32, FLOAT32), (BF16, FLOAT32)]


def draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=FLOAT64, generator=generator).to(dtype).requires_grad_()


def inverse_of(copies: int) -> Tensor:
    return torch.randperm(copies, generator=torch.Generator().manual_seed(1))


def at_once(rows: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """The definition, by a tensor `[T, k, d]`."""
    copies = rows[inverse].view(*weights.shape, rows.shape[1])
    return (copies * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def results(call: Callable[..., Tensor], rows: Tensor, weights: Tensor, inverse: Tensor) -> list[Tensor]:
    output = call(rows, weights, inverse)
    seed = torch.sin(torch.arange(output.numel())).to(output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, (rows, weights), seed)]


@contextmanager
def blocks_of(tokens: int, width: int = WIDTH) -> Iterator[None]:
    with patch.object(ops, "BLOCK", tokens * TOP_K * width):
        yield


@pytest.mark.parametrize("tokens", [1, 4, 13, 100])
@pytest.mark.parametrize(("dtype", "weights_dtype"), DTYPES)
def test_same_bits_as_at_once(dtype: torch.dtype, weights_dtype: torch.dtype, tokens: int) -> None:
    inverse = inverse_of(TOKENS * TOP_K)
    given = draw(dtype, TOKENS * TOP_K, WIDTH), draw(weights_dtype, TOKENS, TOP_K, seed=2), inverse
    expected = results(at_once, *given)
    with blocks_of(tokens):
        for a, b in zip(results(combine, *given), expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_bfloat16_weights_are_multiplied_in_float32() -> None:
    inverse = inverse_of(TOKENS * TOP_K)
    rows, weights = draw(BF16, TOKENS * TOP_K, WIDTH), draw(BF16, TOKENS, TOP_K, seed=2)
    assert torch.equal(combine(rows, weights, inverse), at_once(rows, weights.float(), inverse))


@pytest.mark.parametrize("tokens", [1, 100])
def test_gradient_of_copies_in_blocks(tokens: int) -> None:
    order = inverse_of(TOKENS * TOP_K)
    x = draw(FLOAT32, TOKENS, WIDTH)
    rows = permute(x, order, invert(order), TOP_K)
    seed = torch.sin(torch.arange(rows.numel())).view_as(rows)
    with blocks_of(tokens):
        (got,) = torch.autograd.grad(rows, x, seed)
    assert torch.equal(got, seed[invert(order)].view(TOKENS, TOP_K, WIDTH).sum(1))


def test_without_tokens() -> None:
    rows, weights = draw(FLOAT32, 0, WIDTH), draw(FLOAT32, 0, TOP_K)
    output, *grads = results(combine, rows, weights, inverse_of(0))
    assert output.shape == (0, WIDTH)
    assert [g.shape for g in grads] == [rows.shape, weights.shape]


def test_differentiable_twice() -> None:
    inverse = inverse_of(4 * TOP_K)
    order = invert(inverse)
    given = draw(FLOAT64, 4, 2), draw(FLOAT64, 4, TOP_K, seed=2)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, w: combine(permute(x, order, inverse, TOP_K).sin(), w, inverse), given)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an op has returned."""

    size = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out: Any = op(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.size = max(self.size, tensor.nbytes)
        return out


def test_largest_temporary_tensor() -> None:
    tokens, width, block = 512, 64, 16
    rows, weights = draw(BF16, tokens * TOP_K, width).detach(), draw(FLOAT32, tokens, TOP_K).detach()
    inverse = inverse_of(tokens * TOP_K)
    grad = draw(BF16, tokens, width).detach()
    with blocks_of(block, width):
        with Largest() as forward:
            out = ops._combine(rows, weights, inverse)
        with Largest() as backward:
            to_rows, _ = ops._combine_backward(grad, rows, weights, inverse)
    in_float32 = tokens * TOP_K * width * 4
    assert forward.size == out.nbytes < in_float32 / 5
    assert backward.size == to_rows.nbytes == in_float32 / 2  # the gradient itself, in bfloat16
    with Largest() as at_once_:
        at_once(rows, weights, inverse)
    assert at_once_.size == in_float32  # this test sees such a tensor where there is one
