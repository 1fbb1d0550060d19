"""The kernels as differentiable ops, on the CPU, against autograd through plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.ops.kernels.functional import activate, combine, gather, scatter

TOKENS, TOP_K, WIDTH = 9, 3, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def layer(x: Tensor, weights: Tensor, order: Tensor, local: Tensor) -> Tensor:
    """A layer's way of a token, by the kernels."""
    inverse = torch.argsort(order)
    rows = gather(scatter(x, inverse, TOP_K, len(order)), local, torch.argsort(local))
    rows = gather(activate(rows, "silu", True), torch.argsort(local), local)
    return combine(rows, weights, inverse, TOP_K)


def plain(x: Tensor, weights: Tensor, order: Tensor, local: Tensor) -> Tensor:
    gate, up = x[order // TOP_K][local].chunk(2, dim=1)
    rows = (F.silu(gate) * up)[torch.argsort(local)][torch.argsort(order)]
    return (rows.view(TOKENS, TOP_K, -1) * weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("frozen", [None, "x", "weights"])
def test_gradients_of_a_layer(frozen: str | None) -> None:
    order, local = torch.randperm(TOKENS * TOP_K), torch.randperm(TOKENS * TOP_K)
    results = []
    for way in (layer, plain):
        x, weights = random(TOKENS, 2 * WIDTH), random(TOKENS, TOP_K, seed=1)
        if frozen is not None:
            (x if frozen == "x" else weights).requires_grad_(False)
        out = way(x, weights, order, local)
        out.backward(random(TOKENS, WIDTH, seed=2))
        results.append((out.detach(), x.grad, weights.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert (results[0][1] is None, results[0][2] is None) == (frozen == "x", frozen == "weights")


def test_moves_are_differentiable_twice() -> None:
    order = torch.randperm(TOKENS * TOP_K)
    inverse = torch.argsort(order)
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: scatter(x, inverse, TOP_K, len(order)),
        lambda x: combine(x.repeat_interleave(TOP_K, 0), None, inverse, TOP_K),
        lambda x: gather(x.repeat_interleave(TOP_K, 0), order, inverse),
    )
    for function in functions:
        x = random(TOKENS, WIDTH)
        (grad,) = torch.autograd.grad((function(x) ** 3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        wide = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(expected_cube(function, wide), wide, create_graph=True)
        torch.testing.assert_close(second.double(), torch.autograd.grad(expected.sum(), wide)[0], rtol=1e-4, atol=1e-4)


def expected_cube(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The sum of cubes of a linear function of x, given by its matrix."""
    basis = torch.eye(TOKENS)
    matrix = torch.stack([function(column[:, None].expand(-1, WIDTH).contiguous())[:, 0] for column in basis], dim=1)
    return ((matrix.double() @ x) ** 3).sum()


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_ops_are_registered_correctly() -> None:
    ops, order = torch.ops.hecate, torch.randperm(TOKENS * TOP_K)
    inverse, rows = torch.argsort(order), random(TOKENS * TOP_K, WIDTH)
    torch.library.opcheck(
        ops.scatter_rows.default, (random(TOKENS, WIDTH), inverse, TOP_K, len(order)), test_utils=QUICK
    )
    torch.library.opcheck(ops.gather_rows.default, (rows, order, inverse), test_utils=QUICK)
    torch.library.opcheck(ops.combine_rows.default, (rows, random(TOKENS, TOP_K), inverse, TOP_K))
    torch.library.opcheck(ops.combine_rows.default, (rows, None, inverse, TOP_K), test_utils=QUICK)
    torch.library.opcheck(ops.activate.default, (rows, "gelu", True), test_utils=QUICK)
