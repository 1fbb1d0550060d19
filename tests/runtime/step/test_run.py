"""How the rows of a layer are handed to its stacks of weights."""

from __future__ import annotations

import torch

from hecate.runtime.step.run import _split


def test_experts_may_change_their_rows_in_place() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def outputs(x: torch.Tensor) -> torch.Tensor:
        first, none, last = _split(x * 1, [2, 0, 3])
        return torch.cat([first.mul_(2), none, last.square()])

    assert torch.equal(outputs(x), torch.cat([x[:2] * 2, x[2:].square()]))
    assert torch.autograd.gradcheck(outputs, (x,))
    assert torch.autograd.gradgradcheck(outputs, (x,))
