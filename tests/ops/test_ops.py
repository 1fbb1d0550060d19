"""Grouped products and permutations against loops and autograd's own check."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from hecate.ops.activation import PLAIN, activation
from hecate.ops.grouped import Groups, grouped_bias, grouped_linear
from hecate.ops.kernels.activations import Activation
from hecate.ops.permute import block_order, combine, invert
from tests.ops.copies import permute

CPU = torch.device("cpu")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("sizes", [(3, 0, 2), (0, 0, 0), (5,), (0, 4)])
def test_grouped_linear_is_a_product_per_group(sizes: tuple[int, ...]) -> None:
    groups = Groups.of(sizes, CPU)
    x, weight = _random(sum(sizes), 4), _random(len(sizes), 6, 4)
    expected = torch.cat([rows @ w.t() for rows, w in zip(x.split(list(sizes)), weight, strict=True)])
    torch.testing.assert_close(grouped_linear(x, weight, groups), expected)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, groups), (x, weight))
    assert groups.ends.tolist() == torch.tensor(sizes).cumsum(0).tolist()


def test_grouped_linear_accepts_rows_with_gaps() -> None:
    """A stack may be a view into a buffer of chunks."""
    buffer = torch.randn(3, 40, dtype=torch.float64)
    weight = buffer[:, 8:32].unflatten(1, (6, 4))
    x, groups = _random(5, 4), Groups.of((2, 0, 3), CPU)
    torch.testing.assert_close(grouped_linear(x, weight, groups), grouped_linear(x, weight.contiguous(), groups))


def test_grouped_ops_are_differentiable_twice() -> None:
    groups = Groups.of((2, 0, 3), CPU)
    given = _random(5, 2), _random(3, 4, 2), _random(3, 4)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, w, b: grouped_bias(grouped_linear(x, w, groups), b, groups), given)


def test_a_group_without_rows_gets_a_zero_gradient() -> None:
    weight = _random(3, 6, 4)
    grouped_linear(_random(5, 4), weight, Groups.of((3, 0, 2), CPU)).sum().backward()
    assert weight.grad is not None
    assert weight.grad[1].abs().sum() == 0
    assert weight.grad[0].abs().sum() > 0


@pytest.mark.parametrize("width", [8, 7])  # torch's grouped kernel takes the first only
def test_grouped_linear_of_float32(width: int) -> None:
    buffer = torch.randn(3, 12 * width + 4)
    sizes, weight = (3, 0, 2), buffer[:, 4:].unflatten(1, (12, width)).requires_grad_()
    x = torch.randn(5, width, requires_grad=True)
    products = [rows @ w.t() for rows, w in zip(x.split(list(sizes)), weight, strict=True)]
    wanted = torch.autograd.grad(torch.cat(products).sin().sum(), (x, weight))
    found = torch.autograd.grad(grouped_linear(x, weight, Groups.of(sizes, CPU)).sin().sum(), (x, weight))
    torch.testing.assert_close(found, wanted)
    assert not found[1][1].any()


def _leaving_garbage(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """As torch's kernel on some GPUs: a weight gradient of a group without rows is memory as it was."""
    if b.ndim == 3:
        return _product(a, b, offs)
    out = torch.full((len(offs), a.shape[0], b.shape[1]), torch.nan, dtype=a.dtype)
    start = 0
    for group, end in enumerate(offs.tolist()):
        if end > start:
            out[group] = a[:, start:end] @ b[start:end]
        start = end
    return out


def _product(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    parts = rows.tensor_split(offs[:-1].tolist())
    return torch.cat([part @ w for part, w in zip(parts, weight, strict=True)])


@pytest.mark.parametrize("sizes", [(0, 3, 0, 0, 2), (5, 0), (2, 3)])
def test_a_kernel_that_leaves_garbage_for_empty_groups(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = _random(sum(sizes), 8), _random(len(sizes), 16, 8), _random(sum(sizes), 16).detach()
    groups = Groups.of(sizes, CPU)
    grouped_linear(x, weight, groups).backward(grad)
    expected = weight.grad
    monkeypatch.setattr("hecate.ops.grouped._in_one_call", lambda x, other, other_width: True)
    monkeypatch.setattr("torch.nn.functional.grouped_mm", _leaving_garbage)
    for known in (groups, Groups(None, groups.ends)):
        weight.grad = None
        grouped_linear(x, weight, known).backward(grad)
        torch.testing.assert_close(weight.grad, expected)


def test_grouped_linear_names_sizes_that_differ() -> None:
    with pytest.raises(ValueError, match="weight has 2 groups and x 5 rows, groups say 3 and 5"):
        grouped_linear(_random(5, 4), _random(2, 6, 4), Groups.of((3, 0, 2), CPU))


@pytest.mark.parametrize("top_k", [1, 3])
def test_permute_and_combine(top_k: int) -> None:
    tokens = 5
    order = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(0))
    inverse = invert(order)
    x, weights = _random(tokens, 4), _random(tokens, top_k)
    rows = permute(x, order, inverse, top_k)
    torch.testing.assert_close(rows, x.repeat_interleave(top_k, dim=0)[order])
    torch.testing.assert_close(combine(rows, weights, inverse), x * weights.sum(1, keepdim=True))
    assert torch.autograd.gradcheck(
        lambda x, w: combine(permute(x, order, inverse, top_k).sin(), w, inverse), (x, weights)
    )


def test_block_order() -> None:
    # Blocks of 2, 0 and 3 rows; the last one comes first. Its rows move from place 2 to 0.
    assert block_order(torch.tensor([[2, -3], [3, 2]]), 5).tolist() == [2, 3, 4, 0, 1]
    assert block_order(torch.empty(2, 0, dtype=torch.int64), 0).tolist() == []


def test_ops_are_registered_correctly() -> None:
    ops, order = torch.ops.hecate, torch.randperm(10)
    x, weight, groups = torch.rand(5, 4), torch.rand(3, 6, 4), Groups.of((3, 0, 2), CPU)
    rows, factors, inverse = torch.rand(10, 4), torch.rand(5, 2), invert(order)
    for op, arguments in (
        (ops.grouped_linear, (x, weight, groups.ends, groups.sizes)),
        (ops.grouped_weight_grad, (torch.rand(5, 6), x, groups.ends, groups.sizes)),
        (ops.take_copies, (x, order, 2)),
        (ops.sum_copies, (rows, inverse, 2)),
        (ops.combine, (rows, factors, inverse)),
        (ops.combine_backward, (x, rows, factors, inverse)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("width", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", get_args(Activation))
def test_gated_activation_has_the_bits_of_the_formula(kind: Activation, dtype: torch.dtype, width: int) -> None:
    x = torch.randn(7, 2 * width, dtype=dtype, requires_grad=True)
    grad = torch.randn(7, width, dtype=dtype)
    half, other = x.chunk(2, dim=-1)
    expected = PLAIN[kind](half) * other
    got = activation(x, kind, gated=True, by_kernels=False)
    assert torch.equal(got, expected)
    (got_grad,), (expected_grad,) = (torch.autograd.grad(out, x, grad) for out in (got, expected))
    assert torch.equal(got_grad, expected_grad)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation_is_differentiable_twice(kind: Activation) -> None:
    x = _random(3, 8)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: activation(x, kind, gated=True, by_kernels=False), (x,))
