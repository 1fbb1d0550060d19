"""Muon for experts, AdamW for all other parameters: `torchrun --nproc-per-node 2 -m hecate.examples.muon`.

torch's Muon takes single matrices. A pool holds a stack `[slots, outputs, inputs]` of whole matrices, each on the
device that owns its expert, so one batched computation without communication makes them all orthogonal. The momentum
has one row per slot and moves with the experts. Muon: https://kellerjordan.github.io/posts/muon
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hecate.examples.optimizers import EachParameter, train_tiny
from hecate.values.local import local_tensor

__all__ = ["BatchedMuon", "orthogonal", "split_parameters"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, from the page above."""


class BatchedMuon(EachParameter):
    """Muon with Nesterov momentum over stacks of matrices.

    Args:
        params: `[stack, outputs, inputs]`; DTensors must be sharded in the first dimension only.
        lr: learning rate; multiplied by sqrt(max(1, outputs / inputs)).
        momentum: weight of the old momentum in the new one.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            if flat := [tuple(p.shape) for p in group["params"] if p.ndim != 3]:
                raise ValueError(f"BatchedMuon: parameters of shapes {flat}; must be stacks [stack, outputs, inputs]")

    def update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update one stack in place."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, momentum, weight = map(local_tensor, (gradient, state["momentum_buffer"], parameter))
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(momentum, group["momentum"]))
        outputs, inputs = weight.shape[1:]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * max(1.0, outputs / inputs) ** 0.5)


def orthogonal(stack: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix of `[stack, outputs, inputs]` near 1, in bf16; zeros stay zeros."""
    a, b, c = COEFFICIENTS
    x = stack.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(stack.dtype)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters of a model under FSSDP: (stacks of expert matrices, all others including expert biases)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if name.startswith("hecate_pool_") and p.ndim == 3]
    taken = {id(p) for p in matrices}
    return matrices, [p for _, p in trained if id(p) not in taken]


def main() -> None:
    """Train a tiny random model."""
    train_tiny(lambda model: _optimizers(*split_parameters(model)))


def _optimizers(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [BatchedMuon(matrices, lr=0.01), torch.optim.AdamW(others, lr=1e-3)]


if __name__ == "__main__":
    main()
