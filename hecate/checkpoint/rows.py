"""Stacked expert weights in a checkpoint: one entry, one chunk per expert (docs/design.md, decision 13).

For everything else the planners behave like the defaults of torch.distributed.checkpoint (DCP). The stock `dcp.load`
can read what they write as one stacked tensor, on any number of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, Metadata
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

__all__ = ["ExpertRows", "ExpertsLoadPlanner", "ExpertsSavePlanner"]


@dataclass(frozen=True)
class ExpertRows:
    """The part of a stacked tensor `[num_experts, *shape]` that this rank owns.

    Attributes:
        rows: `[owned, *shape]`, one row per owned expert.
        experts: int64 `[owned]`, expert ids of the rows, ascending.
        num_experts: number of experts in the stacked tensor.
    """

    rows: Tensor
    experts: NDArray[np.int64]
    num_experts: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole stacked tensor."""
        return torch.Size((self.num_experts, *self.rows.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def from_expert(self, expert: int) -> Tensor:
        """The rows starting at `expert`, which must be owned here."""
        return self.rows[int(np.searchsorted(self.experts, expert)) :]

    def write_items(self, name: str) -> Iterator[WriteItem]:
        """One DCP write item (chunk) per owned expert."""
        properties = TensorProperties(dtype=self.dtype)
        for expert in self.experts.tolist():
            chunk = self._chunk(expert, 1)
            data = TensorWriteData(chunk=chunk, properties=properties, size=self.shape)
            yield WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def read_items(self, name: str, saved: TensorStorageMetadata) -> list[ReadItem]:
        """DCP read items for the owned experts, however the saved tensor is chunked; consecutive ids share items."""
        if saved.size != self.shape:
            raise ValueError(f"{name} has shape {tuple(saved.size)} in the checkpoint, {tuple(self.shape)} here")
        starts = np.flatnonzero(np.diff(self.experts, prepend=-2) != 1)
        sizes = np.diff(starts, append=len(self.experts))
        chunks = [self._chunk(int(self.experts[at]), int(n)) for at, n in zip(starts, sizes, strict=True)]
        return create_read_items_for_chunk_list(name, saved, chunks)

    def _chunk(self, expert: int, count: int) -> ChunkStorageMetadata:
        rest = self.rows.shape[1:]
        return ChunkStorageMetadata(torch.Size((expert, *(0 for _ in rest))), torch.Size((count, *rest)))


class ExpertsSavePlanner(DefaultSavePlanner):
    """Writes `ExpertRows` one chunk per expert. If several replicas own an expert, DCP has one of them write it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """The default plan plus the experts owned by this rank."""
        experts, rest = _split(self.state_dict)
        default = create_default_local_save_plan(rest, self.is_coordinator)
        own = [item for name, rows in experts.items() for item in rows.write_items(name)]
        self.plan = SavePlan([*default.items, *own])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor that the entry at `index` is written from."""
        entry = self.state_dict[index.fqn]
        if isinstance(entry, ExpertRows) and index.offset is not None:
            return entry.from_expert(index.offset[0])[:1]
        return super().lookup_object(index)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The data to write. A view gets a storage of exactly its size, without a copy; DCP's writer would copy it."""
        data = super().resolve_data(write_item)
        return _trimmed(data) if isinstance(data, Tensor) else data


def _trimmed(tensor: Tensor) -> Tensor:
    """The same memory wrapped in a storage of exactly the tensor's size; tensors not on the CPU stay as they are."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    # Viewed as bytes, because numpy lacks some dtypes (bfloat16).
    content = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return content.view(tensor.dtype).view(tensor.shape)


class ExpertsLoadPlanner(DefaultLoadPlanner):
    """Reads into `ExpertRows` only the experts they hold, not the rest of the stacked tensor."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep all entries; the default planner would drop `ExpertRows`, which are not tensors."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """The default plan plus the experts owned by this rank."""
        assert self.metadata is not None
        experts, rest = _split(self.state_dict)
        items = list(create_default_local_load_plan(rest, self.metadata).items)
        for name, rows in experts.items():
            saved = self.metadata.state_dict_metadata[name]
            if not isinstance(saved, TensorStorageMetadata):
                raise ValueError(f"{name} is stored as pickled bytes, which are not read")
            items += rows.read_items(name, saved)
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Always ValueError: the default would unpickle the bytes, which can run arbitrary code."""
        raise ValueError(f"{read_item.dest_index.fqn} is stored as pickled bytes, which are not read")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor that the chunk at `index` is read into."""
        entry = self.state_dict[index.fqn]
        if isinstance(entry, ExpertRows) and index.offset is not None:
            return entry.from_expert(index.offset[0])
        return super().lookup_tensor(index)


def _split(state: STATE_DICT_TYPE) -> tuple[dict[str, ExpertRows], dict[str, Any]]:
    experts = {name: value for name, value in state.items() if isinstance(value, ExpertRows)}
    return experts, {name: value for name, value in state.items() if name not in experts}
