"""What users may have attached to a module."""

from __future__ import annotations

from torch import nn

__all__ = ["called_alone"]

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes in which modules keep their hooks; they have no public names."""


def called_alone(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's `forward` and nothing else: no hooks, no `forward` of its own."""
    return "forward" not in vars(module) and not any(getattr(module, kind) for kind in KINDS)
