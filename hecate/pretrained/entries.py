"""Shapes, local parts and tied names of a model's tensors under FSSDP, for reading and writing files."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hecate.checkpoint.rows import ExpertRows
from hecate.checkpoint.state import Entry
from hecate.names import original_name
from hecate.values.local import local_tensor

__all__ = ["first_names", "local_part", "shapes_of"]


def shapes_of(entries: Mapping[str, Entry]) -> dict[str, torch.Size]:
    """Unsharded shapes by name; for stacked experts `[1, ...]`, because they are converted one at a time."""
    return {
        name: torch.Size((1, *entry.shape[1:])) if isinstance(entry, ExpertRows) else entry.shape
        for name, entry in entries.items()
    }


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """The local part of a DTensor and its index in the whole tensor; for a plain tensor, all of it."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, n) for n in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    index = tuple(slice(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))
    return local_tensor(tensor), index


def first_names(model: nn.Module) -> dict[str, str]:
    """Original name of each parameter or buffer -> first name of the same tensor (tied tensors have several names)."""
    first: dict[int, str] = {}
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    named = ((original_name(key), tensor) for key, tensor in tensors)
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
