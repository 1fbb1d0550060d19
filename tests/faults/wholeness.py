"""Checks whether a checkpoint that is marked as complete is complete, without using the code that loads it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from hecate.checkpoint.manifest import verify

__all__ = ["missing"]


def missing(path: Path) -> list[str]:
    """What is damaged, missing or duplicated in the checkpoint `path`; empty if it is complete."""
    try:
        verify(path, 0, 1)
        metadata = dcp.FileSystemReader(path).read_metadata()
    except (ValueError, OSError) as error:
        return [str(error)]
    found = [] if metadata.state_dict_metadata else [f"{path}: has no entry"]
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            found += _not_covered(name, entry) + _not_stored(path, name, entry, metadata)
    return found


def _not_covered(name: str, entry: TensorStorageMetadata) -> list[str]:
    """Faults if elements of the tensor are in no chunk or in several."""
    times = torch.zeros(entry.size, dtype=torch.int32)
    for chunk in entry.chunks:
        times[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
    wrong = int((times != 1).sum())
    return [f"{name}: {wrong} of {times.numel()} elements are not in one chunk"] if wrong else []


def _not_stored(path: Path, name: str, entry: TensorStorageMetadata, metadata: Metadata) -> list[str]:
    """Faults if chunks are in no file."""
    found = []
    for chunk in entry.chunks:
        place = (metadata.storage_data or {}).get(MetadataIndex(name, chunk.offsets))
        file = None if place is None else path / place.relative_path
        if place is None or file is None or not file.exists() or file.stat().st_size < place.offset + place.length:
            found.append(f"{name}: the chunk at {tuple(chunk.offsets)} is in no file")
    return found
