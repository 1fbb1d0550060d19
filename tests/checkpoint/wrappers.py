"""Puts wrappers around parts of a model, as trainers do."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from hecate.models.moe import Experts
from hecate.models.transformer import Block


def wrap(model: nn.Module, what: str) -> None:
    """As trainers do: torch's activation checkpointing, `torch.compile` of each block, or of one part of it."""
    if what in ("checkpoint", "both"):
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    if what in ("compile", "both"):
        blocks = model.get_submodule("blocks")
        model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in blocks.children())
    if what == "compile experts":
        for module in list(model.modules()):
            if isinstance(getattr(module, "experts", None), Experts):
                module.experts = torch.compile(module.experts, backend="eager")
