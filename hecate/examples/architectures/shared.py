"""Trains a small model of one kind of layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.examples.shared import say
from hecate.models.moe import Experts
from hecate.ranks.agree import rank_and_world
from hecate.ranks.join import join

__all__ = ["WIDTH", "Loss", "Model", "experts", "regression", "train"]

WIDTH = 32

Loss = Callable[[nn.Module, Tensor], Tensor]
"""(model, noise `[T, WIDTH]`, T a multiple of 8) -> scalar; the same noise gives the same loss."""


def experts(number: int, hidden: int = 32) -> Experts:
    """Experts with random weights."""
    made = Experts(number, WIDTH, hidden)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return made


class Model(nn.Module):
    """Two residual layers."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, WIDTH]` to `[T, WIDTH]`."""
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (WIDTH,)))
        return self.head(x)


def regression(model: nn.Module, x: Tensor) -> Tensor:
    """Mean square error of a fixed function of the inputs."""
    wanted = (2 * x.roll(1, dims=1)).tanh()
    loss: Tensor = (model(x) - wanted).square().mean()
    return loss


def train(make: Callable[[], nn.Module], loss_of: Loss = regression, steps: int = 30) -> None:
    """Train the model that `make` gives, on random inputs; prints the loss and the loads."""
    device = join()
    torch.manual_seed(0)
    model = make().to(device)
    engine = hecate.fully_shard(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    torch.manual_seed(1 + rank_and_world()[0])
    for step in range(steps):
        loss = loss_of(model, torch.randn(128, WIDTH, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            say(f"step {step}: loss {loss.item():.4f}")
    say(f"tokens an expert: {[load.tolist() for load in engine.loads()]}")
    if dist.is_initialized():
        dist.destroy_process_group()
