"""Shapes and local parts of a model's tensors under FSSDP, for reading and writing files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hecate.checkpoint.rows import ExpertRows
from hecate.checkpoint.state import Entry
from hecate.values.local import local_tensor

__all__ = ["local_part", "shapes_of"]


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
