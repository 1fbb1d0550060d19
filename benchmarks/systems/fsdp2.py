"""Torch's FSDP2 on everything: every device gathers all experts, so skew does not matter, and traffic is largest."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.systems.base import System, Task

__all__ = ["fsdp2"]


def fsdp2(task: Task) -> System:
    """One FSDP2 unit per block and one for the rest, as torch's documentation advises."""
    model = task.build()
    blocks = model.blocks if task.kind == "gpt" else model.model.layers  # type: ignore[union-attr]
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        fully_shard(block, mesh=task.world.mesh)
    fully_shard(model, mesh=task.world.mesh)
    return System(task, model, partial(nn.utils.clip_grad_norm_, list(model.parameters())))
