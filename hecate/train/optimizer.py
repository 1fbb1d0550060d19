"""The optimizer of a run, and its learning rate."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import Optimizer

from hecate.train.settings import OptimizerSettings

__all__ = ["learning_rate", "make_optimizer"]


def make_optimizer(settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """The optimizer of all parameters of a sharded model; ValueError if it cannot be made, or is none."""
    made = settings.target.make(list(model.parameters()), lr=settings.lr)
    if not isinstance(made, Optimizer):
        raise ValueError(
            f"optimizer._target_={settings.target.path!r}: returned {type(made).__name__}; must be a torch optimizer"
        )
    return made


def learning_rate(step: int, steps: int, optimizer: OptimizerSettings) -> float:
    """Learning rate of step 1..steps: linear warm-up to `lr`, then half a cosine down to `final_lr_share * lr`."""
    if step <= optimizer.warmup:
        return optimizer.lr * step / optimizer.warmup
    done = (step - optimizer.warmup) / max(steps - optimizer.warmup, 1)
    share = optimizer.final_lr_share + (1 - optimizer.final_lr_share) * (1 + math.cos(math.pi * done)) / 2
    return optimizer.lr * share
