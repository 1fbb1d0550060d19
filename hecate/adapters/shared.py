"""Finds the shared experts of a model: branches beside its experts modules that all tokens run through."""

from __future__ import annotations

import re

from torch import nn

from hecate.names import WRAPPED, original_name

__all__ = ["shared_experts_of"]

NAMES = re.compile(r"shared(_(expert|experts|mlp|ffn))?")
"""Attributes that models have their shared experts at."""


def shared_experts_of(name: str, model: nn.Module) -> nn.Module | None:
    """The shared experts beside an experts module, or beside the module that holds it; None if there are none.

    Shared experts inside a wrapper of their own (activation checkpointing, torch.compile) count as none.

    Args:
        name: original name of the experts module.
        model: the model.
    """
    parent = name.rpartition(".")[0]
    modules = list(model.named_modules())
    for place in dict.fromkeys((parent, parent.rpartition(".")[0])):
        for key, module in modules:
            before, _, child = key.rpartition(".")
            if NAMES.fullmatch(child) and original_name(before) == place and _is_branch(module):
                return module
    return None


def _is_branch(module: nn.Module) -> bool:
    """Whether it has parameters, and is no wrapper of another module."""
    wraps = any(name in WRAPPED for name, _ in module.named_children())
    return not wraps and next(module.parameters(), None) is not None
