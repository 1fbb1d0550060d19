"""The kernels that move rows of tokens and combine results, on the CPU, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hecate.ops.kernels.launch import ThreadOrder
from hecate.ops.kernels.rows import OwnRows, combine_backward, combine_rows, gather_rows, scatter_rows
from tests.ops.kernels.shared import CASTS, DTYPES, ORDERS, WIDTHS, matrix, orders, same_bits

COMBINED = (*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32))


def random_inverse(tokens: int, top_k: int, seed: int = 0) -> tuple[Tensor, int]:
    """A row for each copy but about every fifth, and the number of rows."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(tokens * top_k, generator=generator) > 0.2
    inverse = torch.full((tokens * top_k,), -1)
    rows = int(kept.sum())
    inverse[kept] = torch.randperm(rows, generator=generator)
    return inverse, rows


def random_weights(tokens: int, top_k: int) -> Tensor:
    return torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("source", "target"), CASTS)
@pytest.mark.parametrize("misaligned", [False, True])
def test_scatter(width: int, source: torch.dtype, target: torch.dtype, misaligned: bool) -> None:
    x, (inverse, rows) = matrix(37, width, source, misaligned=misaligned), random_inverse(37, 3)
    copies = torch.nonzero(inverse >= 0).flatten()
    expected = torch.empty(rows, width, dtype=target)
    expected[inverse[copies]] = x[copies // 3].to(target)
    for order in ORDERS:
        same_bits(scatter_rows(x, inverse, 3, rows, target, order=order), expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("source", "target"), CASTS)
@pytest.mark.parametrize("misaligned", [False, True])
def test_gather(width: int, source: torch.dtype, target: torch.dtype, misaligned: bool) -> None:
    x = matrix(29, width, source, misaligned=misaligned)
    index = torch.randint(0, 29, (61,), generator=torch.Generator().manual_seed(2))
    for order in ORDERS:
        same_bits(gather_rows(x, index, target, order=order), x[index].to(target))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    x = matrix(tokens, 16, torch.bfloat16)
    inverse = torch.arange(2 * tokens)
    rows = scatter_rows(x, inverse, 2, 2 * tokens)
    same_bits(rows, x.repeat_interleave(2, 0))
    same_bits(gather_rows(rows, inverse), rows)
    weights = random_weights(tokens, 2)
    assert combine_rows(rows, inverse, weights, 2).shape == (tokens, 16)
    grad_rows, grad_weights = combine_backward(x, rows, inverse, weights)
    assert grad_rows is not None
    assert grad_weights is not None
    assert (grad_rows.shape, grad_weights.shape) == (rows.shape, weights.shape)


@pytest.mark.parametrize("width", [7, 64])
def test_own_rows_do_not_pass_through_the_wire(width: int) -> None:
    """Rows 4 to 11 of the wire stay here: not sent, not received, not rounded to the dtype of the wire."""
    tokens, top_k, begin, end = 11, 2, 4, 11
    x, inverse = matrix(tokens, width, torch.float32), torch.randperm(tokens * top_k)
    order = torch.argsort(inverse)
    wire = scatter_rows(x, inverse, top_k, tokens * top_k, torch.bfloat16, skip=(begin, end))
    wire[begin:end] = float("nan")  # what is there must not be read
    arrived = torch.randperm(tokens * top_k)
    own = OwnRows(x, order[begin:end].contiguous(), begin, end, top_k)
    rows = gather_rows(wire, arrived, torch.float32, own)
    expected = x[order // top_k].to(torch.bfloat16).float()
    expected[begin:end] = x[order[begin:end] // top_k]
    same_bits(rows, expected[arrived])
    back = OwnRows(rows, torch.argsort(arrived)[begin:end].contiguous(), begin, end)
    summed = combine_rows(wire, inverse, None, top_k, torch.float32, back)
    same_bits(summed, expected[inverse].view(tokens, top_k, width).sum(1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("source", "target"), COMBINED)
@pytest.mark.parametrize("top_k", [1, 3, 11])
def test_combine_adds_in_order_in_float32(width: int, source: torch.dtype, target: torch.dtype, top_k: int) -> None:
    tokens = 41
    inverse, rows = random_inverse(tokens, top_k)
    x, weights = matrix(rows, width, source), random_weights(tokens, top_k)
    for given in (weights, None):
        expected = torch.zeros(tokens, width)
        for j, row in enumerate(inverse.view(tokens, top_k).T):
            scale = torch.ones(tokens, 1) if given is None else given[:, j : j + 1]
            expected[row >= 0] += x[row[row >= 0]].float() * scale[row >= 0]
        for order in ORDERS:
            same_bits(combine_rows(x, inverse, given, top_k, target, order=order), expected.to(target))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("source", "target"), COMBINED)
@pytest.mark.parametrize("top_k", [1, 3, 11])
def test_combine_backward(width: int, source: torch.dtype, target: torch.dtype, top_k: int) -> None:
    tokens = 23
    inverse, rows = random_inverse(tokens, top_k)
    x, weights, grad = matrix(rows, width, source), random_weights(tokens, top_k), matrix(tokens, width, target, seed=3)
    kept = torch.nonzero(inverse >= 0).flatten()
    of_token = grad[kept // top_k]
    expected_rows = torch.empty_like(x)
    expected_rows[inverse[kept]] = (of_token.float() * weights.flatten()[kept, None]).to(source)
    expected_weights = torch.zeros(tokens * top_k, dtype=torch.float64)
    expected_weights[kept] = (of_token.double() * x[inverse[kept]].double()).sum(1)

    results = [combine_backward(grad, x, inverse, weights, order=order) for order in ORDERS]
    for grad_rows, grad_weights in results:
        same_bits(grad_rows, expected_rows)
        same_bits(grad_weights, results[0][1])  # whatever the order of threads
        torch.testing.assert_close(grad_weights.double(), expected_weights.view(tokens, top_k), rtol=1e-5, atol=2e-3)


@orders
def test_special_values_survive_a_cast(order: ThreadOrder) -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 6e-8, 65519.0, 65520.0, 3e38])
    x = torch.cat([values, -values, torch.logspace(-46, 38, 984), torch.arange(0, 65536.0, 7.3)[:8192]])[None]
    index = torch.zeros(1, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = gather_rows(x, index, dtype, order=order)
        same_bits(narrow, x.to(dtype))
        assert torch.equal(narrow.signbit()[0, [0, 1]], torch.tensor([False, True]))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)[None]
    for dtype in (torch.bfloat16, torch.float16):
        same_bits(gather_rows(every.view(dtype), index, torch.float32, order=order), every.view(dtype).float())


def test_bad_input_is_named() -> None:
    x, index = matrix(4, 8, torch.bfloat16), torch.arange(4)
    with pytest.raises(TypeError, match=r"no kernel casts torch.bfloat16 to torch.float16"):
        gather_rows(x, index, torch.float16)
    with pytest.raises(ValueError, match=r"x: shape \(8, 4\), strides \(1, 8\); must be a matrix with contiguous rows"):
        gather_rows(x.t(), index)
    with pytest.raises(ValueError, match=r"weights torch\.float64"):
        combine_rows(x, index, torch.ones(2, 2, dtype=torch.float64), 2)
    with pytest.raises(TypeError, match=r"dtype torch\.float64; the kernels compute in"):
        combine_rows(x.double(), index, None, 2)
