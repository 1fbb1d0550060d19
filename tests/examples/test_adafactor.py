"""The Adafactor of the examples against torch's, on plain tensors, a matrix at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hecate.examples.adafactor import ShardedAdafactor

SETTINGS = {"lr": 0.03, "weight_decay": 0.1}


def parameters(scale: float) -> list[nn.Parameter]:
    """Two stacks, a matrix and a vector in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 4, 6), (2, 5, 2), (7, 3), (8,)]
    return [nn.Parameter(scale * torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def apart(tensors: list[Tensor]) -> list[Tensor]:
    """Each matrix of a stack by itself."""
    return [matrix.clone() for t in tensors for matrix in (t.unbind(0) if t.ndim == 3 else [t])]


@pytest.mark.parametrize("scale", [1.0, 1e-5])  # the latter below eps
def test_equals_torchs_on_each_matrix(scale: float) -> None:
    ours = parameters(scale)
    single = [nn.Parameter(t) for t in apart([p.detach() for p in ours])]
    optimizers = ShardedAdafactor(ours, **SETTINGS), torch.optim.Adafactor(single, **SETTINGS)
    generator = torch.Generator().manual_seed(4)
    for step in range(4):
        for p in ours:
            p.grad = 10.0 ** (3 * step - 6) * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for p, gradient in zip(single, apart([p.grad for p in ours if p.grad is not None]), strict=True):
            p.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(apart([p.detach() for p in ours]), [p.detach() for p in single])


def test_rows_without_gradients_stay() -> None:
    """As a pool's padding does."""
    stack = nn.Parameter(torch.zeros(2, 3, 3))
    stack.grad = torch.zeros(2, 3, 3)
    stack.grad[0] = 1.0
    ShardedAdafactor([stack]).step()
    assert stack[0].all()
    assert not stack[1].any()
