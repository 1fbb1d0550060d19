"""A model's tensors under FSSDP as files see them."""

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
    """Whole shapes; of stacked experts those of a stack of one, as they are converted."""
    return {
        name: torch.Size((1, *entry.shape[1:])) if isinstance(entry, ExpertRows) else entry.shape
        for name, entry in entries.items()
    }


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this device has of a DTensor, and where in the whole; all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, n) for n in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    index = tuple(slice(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))
    return local_tensor(tensor), index


def first_names(model: nn.Module) -> dict[str, str]:
    """Original name of a parameter or buffer -> the first one of the same tensor: tied ones have several."""
    first: dict[int, str] = {}
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    named = ((original_name(key), tensor) for key, tensor in tensors)
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
