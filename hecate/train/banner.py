"""What a run says before its first step: enough to know afterwards what it was."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch

import hecate
from hecate.placement import Topology
from hecate.train.distributed import World
from hecate.train.settings import FolderSettings, Settings
from hecate.train.target import Target
from hecate.train.work import Work

__all__ = ["banner"]


def banner(settings: Settings, world: World, work: Work, data: str) -> list[str]:
    """Lines on model, devices, data, policy, versions and configuration."""
    fssdp, topology = settings.fssdp, Topology.detect(world.size)
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    nodes = f"{topology.num_nodes} node{'s' if topology.num_nodes > 1 else ''}"
    tokens = settings.batch_size * settings.sequence_length * settings.accumulate * world.size
    return [
        f"run      {settings.name}, {settings.steps} steps of {tokens:,} tokens, seed {settings.seed}",
        f"model    {_kind(settings)}, {work.parameters:,} parameters{_known(work.active, ', {:,} active per token')}; "
        f"{len(work.experts)} MoE layers of {_range(work.experts)} experts{_known(work.top_k, ', top {}')}",
        f"devices  {world.size} {world.device.type} ({name}), {nodes}",
        f"policy   {fssdp.policy}, dense {fssdp.dense}, re-sharding every {fssdp.reshard_interval} steps",
        f"data     {data}",
        f"versions hecate {hecate.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"config   {settings.folder / 'config.yaml'}",
    ]


def _kind(settings: Settings) -> str:
    if isinstance(settings.model, FolderSettings):
        return f"{settings.model.path} ({'its weights' if settings.model.has_weights else 'random weights'})"
    return settings.model.path if isinstance(settings.model, Target) else settings.kind


def _known(value: int | None, text: str) -> str:
    return "" if value is None else text.format(value)


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"
