"""Original names: what a model's modules, parameters and buffers are called without the wrappers around them.

`torch.compile` and activation checkpointing put a module of their own between a block and its parent, before or after
`fully_shard`. Whatever this package writes, reads, seeds or reports by name uses the name without them.
"""

from __future__ import annotations

from itertools import chain

from torch import nn

__all__ = ["WRAPPED", "first_names", "original_modules", "original_name"]

WRAPPED = frozenset({"_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"})
"""What wrappers call the module that they wrap: activation checkpointing's, torch.compile's, FSDP1's."""


def original_name(name: str) -> str:
    """`name` as it is in the model without wrappers; "" for a wrapped root."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def original_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by original name, in module order; for a wrapper, the module that it wraps."""
    # A wrapper and what it wraps have one original name, and the wrapper comes first.
    return {original_name(name): module for name, module in model.named_modules()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Original name of each parameter or buffer -> first name of the same tensor (tied tensors have several names)."""
    first: dict[int, str] = {}
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    named = ((original_name(key), tensor) for key, tensor in tensors)
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
