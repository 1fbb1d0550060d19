"""Common code of the example optimizers: a step over all parameters, and training of a tiny model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM

import hecate
from hecate.examples.shared import Text, say, tiny_config
from hecate.ranks.agree import rank_and_world
from hecate.ranks.join import join

__all__ = ["EachParameter", "train_tiny"]


class EachParameter(Optimizer):
    """Base class of optimizers that update one parameter after the other."""

    @abstractmethod
    def update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update `parameter` in place; `group` has the settings."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns the result of `closure`."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)
        return result


def train_tiny(make: Callable[[nn.Module], Sequence[Optimizer]]) -> None:
    """Train a random model of `tiny_config` on text for 30 steps with the optimizers that `make` returns."""
    device = join()
    torch.manual_seed(0)  # the same model on every rank
    model = AutoModelForCausalLM.from_config(tiny_config()).to(device)
    hecate.fully_shard(model)
    optimizers = make(model)
    rank, world = rank_and_world()
    text = Text(length=128, size=30 * 8 * world)
    for step, batch in enumerate(DataLoader(text, 8, sampler=DistributedSampler(text, world, rank))):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 9:
            say(f"step {step}: loss {loss.item():.4f}")
