"""transformers' own expert parallelism: FSDP2 for the dense part, an all-to-all of tokens, no balancing."""

from __future__ import annotations

import tempfile
from functools import partial

import torch.distributed as dist
from torch import nn

from benchmarks.systems.base import MissingError, System, Task, clip_by_total_norm

__all__ = ["transformers_ep"]


def transformers_ep(task: Task) -> System:
    """A Mixtral with `DistributedConfig(fsdp_size=N, ep_size=N, ep_implementation="all_to_all")`. Collective."""
    if task.kind != "mixtral":
        raise MissingError("transformers-ep trains models of transformers only: pass --model mixtral")
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise MissingError("transformers with DistributedConfig (>= 5.22) is not installed") from error
    size = task.world.size
    config = DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="all_to_all")
    model = _loaded(task, config)
    # torch refuses to clip gradients on different meshes together, as experts and dense part have.
    return System(task, model, partial(clip_by_total_norm, list(model.parameters()), []))


def _loaded(task: Task, config: object) -> nn.Module:
    """Written by rank 0 and read by all: transformers shards models only while it loads them."""
    from transformers import MixtralForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        folder = task.world.broadcast(folder)
        if task.world.rank == 0:
            task.build().save_pretrained(folder)  # type: ignore[operator]
        dist.barrier()
        model: nn.Module = MixtralForCausalLM.from_pretrained(folder, distributed_config=config).train()
        dist.barrier()
    return model
