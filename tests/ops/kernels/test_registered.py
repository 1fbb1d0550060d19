"""The kernels as ops of the dispatcher and as differentiable functions, on the CPU, against plain torch."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from hecate.ops.activation import activation
from hecate.ops.kernels.activations import Activation
from hecate.ops.kernels.quota import QuotaProblem
from hecate.ops.kernels.registered import gather_rows, scatter_rows
from hecate.ops.kernels.rows import OwnRows
from hecate.ops.permute import combine
from hecate.placement import Placement, Topology

TOKENS, TOP_K, WIDTH = 9, 3, 24
ORDER = torch.randperm(TOKENS * TOP_K, generator=torch.Generator().manual_seed(0))
INVERSE = torch.argsort(ORDER)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def derivatives(function: object, *inputs: Tensor) -> list[Tensor]:
    """The result, and the first and second derivatives of its cube."""
    out = function(*inputs)  # type: ignore[operator]
    first = torch.autograd.grad(out.double().pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.double().pow(2).sum() for g in first), inputs)
    return [out, *first, *second]


def close(got: Tensor, expected: Tensor) -> None:
    error, norm = (got - expected).norm(), expected.norm()
    assert error <= 1e-5 * norm, f"off by {error / norm:.2e} of its norm"


@pytest.mark.parametrize("dropped", [0, 4])
def test_combine_equals_torch_and_is_differentiable_twice(dropped: int) -> None:
    order = ORDER[dropped:]
    rows, weights = random(len(order), WIDTH), random(TOKENS, TOP_K, seed=1)
    results = []
    for by_kernels, missing in ((True, -1), (True, len(order)), (False, len(order))):
        inverse = torch.full((TOKENS * TOP_K,), missing)
        inverse[order] = torch.arange(len(order))
        if dropped:
            weights = weights.detach().masked_fill((inverse == missing).view(TOKENS, TOP_K), 0).requires_grad_()
        results.append(
            derivatives(lambda r, w, inverse=inverse, by=by_kernels: combine(r, w, inverse, by), rows, weights)
        )
    for result in results[:2]:
        for got, expected in zip(result, results[2], strict=True):
            close(got, expected)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_combine_of_bfloat16_adds_in_float32(weights_dtype: torch.dtype) -> None:
    rows, weights = random(len(ORDER), WIDTH, dtype=torch.bfloat16), random(TOKENS, TOP_K, dtype=weights_dtype)
    grad = random(TOKENS, WIDTH, seed=2, dtype=torch.bfloat16).detach()
    results = []
    for by_kernels in (True, False):
        out = combine(rows, weights, INVERSE, by_kernels)
        results.append([out, *torch.autograd.grad(out, (rows, weights), grad)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", get_args(Activation))
def test_activations_equal_torch_and_are_differentiable_twice(kind: Activation, gated: bool) -> None:
    x = random(7, 2 * WIDTH)
    results = [derivatives(lambda x, by=by: activation(x, kind, gated, by), x) for by in (True, False)]
    for got, expected in zip(*results, strict=True):
        close(got, expected)


def test_casts_without_a_kernel_are_made_by_torch() -> None:
    x = random(TOKENS, WIDTH).detach().double()
    rows = scatter_rows(x, INVERSE, TOP_K, len(ORDER), torch.bfloat16)
    assert torch.equal(rows, x[ORDER // TOP_K].bfloat16())


def test_gradients_of_any_strides() -> None:
    x = random(1, 1).detach().expand(len(ORDER), WIDTH)
    assert torch.equal(gather_rows(x, ORDER), x)


def test_gradients_of_no_rows_have_any_strides() -> None:
    """As of a sum over no tokens; `contiguous()` does not change the strides of a tensor without elements."""
    rows, weights, none = random(0, WIDTH), random(0, TOP_K), torch.empty(0, dtype=torch.int64)
    combine(rows, weights, none, by_kernels=True).sum().backward()
    activation(rows, "silu", True, by_kernels=True).sum().backward()
    assert rows.grad is not None
    assert (rows.grad.shape, weights.grad.shape) == ((0, WIDTH), (0, TOP_K))


def test_ops_are_registered_correctly() -> None:
    ops, rows, bf16 = torch.ops.hecate, random(len(ORDER), WIDTH).detach(), torch.bfloat16
    x, weights, index = rows[:TOKENS], random(TOKENS, TOP_K).detach(), torch.arange(10).view(5, 2) % 4
    own = OwnRows(rows.bfloat16(), ORDER[2:5], 2, 5)
    none, owned = (None, None, 0, 0, 1), (own.rows, own.index, own.begin, own.end, 1)
    first, zeros = torch.arange(5), torch.zeros(4, dtype=torch.int64)
    counts, tiles = ops.count_experts(index, 4)
    start = counts[:4].cumsum(0) - counts[:4]
    problem = QuotaProblem.of(Placement([[True, True], [False, True]]), Topology(2, 2), torch.device("cpu"))
    for op, args in (
        (ops.scatter_rows, (x, INVERSE, TOP_K, len(ORDER), bf16, [0, 0])),
        (ops.gather_rows, (rows, ORDER, bf16, *owned)),
        (ops.combine_rows, (rows, INVERSE, weights, TOP_K, torch.float32, *none)),
        (ops.combine_rows, (rows, INVERSE, None, TOP_K, torch.float32, *none)),
        (ops.combine_rows_backward, (x, rows, weights, INVERSE)),
        (ops.count_experts, (index, 4)),
        (ops.sort_copies, (index, counts, tiles, first, zeros, start, 10)),
        (ops.exact_quota, (torch.tensor([[3, 1], [2, 5]]), problem.sizes, problem.tables)),
        (ops.activate, (rows, "gelu", True)),
        (ops.activate_backward, (x[:, : WIDTH // 2], x, "gelu", True)),
        (ops.pack_rows, ([rows.view(-1, 3, 8), rows], [0, 32], torch.empty(len(ORDER), 64, dtype=bf16))),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
