"""Stacked expert weights in a checkpoint: one entry, one chunk per expert (docs/design.md, decision 13).

The planners are torch.distributed.checkpoint's default ones for everything else. What they write, the stock `dcp.load`
reads as one stacked tensor anywhere.
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
    """What this device has of a stacked tensor `[num_experts, *shape]`.

    Attributes:
        rows: `[owned, *shape]`.
        experts: int64 `[owned]`, their ids, ascending.
        num_experts: of the stacked tensor.
    """

    rows: Tensor
    experts: NDArray[np.int64]
    num_experts: int

    @property
    def shape(self) -> torch.Size:
        """Of the stacked tensor."""
        return torch.Size((self.num_experts, *self.rows.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def from_expert(self, expert: int) -> Tensor:
        """The rows from that owned expert on."""
        return self.rows[int(np.searchsorted(self.experts, expert)) :]

    def write_items(self, name: str) -> Iterator[WriteItem]:
        """One chunk per expert."""
        properties = TensorProperties(dtype=self.dtype)
        for expert in self.experts.tolist():
            chunk = self._chunk(expert, 1)
            data = TensorWriteData(chunk=chunk, properties=properties, size=self.shape)
            yield WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def read_items(self, name: str, saved: TensorStorageMetadata) -> list[ReadItem]:
        """However it was cut when it was saved; experts with consecutive ids are read together."""
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
    """Writes `ExpertRows` by expert. Where several replicas own an expert, DCP lets one of them write it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """All of the default plan, and the experts owned here."""
        experts, rest = _split(self.state_dict)
        default = create_default_local_save_plan(rest, self.is_coordinator)
        own = [item for name, rows in experts.items() for item in rows.write_items(name)]
        self.plan = SavePlan([*default.items, *own])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor to write."""
        entry = self.state_dict[index.fqn]
        if isinstance(entry, ExpertRows) and index.offset is not None:
            return entry.from_expert(index.offset[0])[:1]
        return super().lookup_object(index)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """What to write, in storage of its own: DCP's writer copies tensors that are views of a larger one."""
        data = super().resolve_data(write_item)
        return _trimmed(data) if isinstance(data, Tensor) else data


def _trimmed(tensor: Tensor) -> Tensor:
    """The same memory, as a storage that ends where the tensor does; other tensors than on the CPU as they are."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    # By way of bytes, as numpy does not have all dtypes.
    content = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return content.view(tensor.dtype).view(tensor.shape)


class ExpertsLoadPlanner(DefaultLoadPlanner):
    """Reads into `ExpertRows` the experts they have, and nothing else of the stacked tensor."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As the default, which however drops entries that are no tensors."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """All of the default plan, and the experts owned here."""
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
        """ValueError: the default unpickles them, and with them runs whatever code they hold."""
        raise ValueError(f"{read_item.dest_index.fqn} is stored as pickled bytes, which are not read")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where to read to."""
        entry = self.state_dict[index.fqn]
        if isinstance(entry, ExpertRows) and index.offset is not None:
            return entry.from_expert(index.offset[0])
        return super().lookup_tensor(index)


def _split(state: STATE_DICT_TYPE) -> tuple[dict[str, ExpertRows], dict[str, Any]]:
    experts = {name: value for name, value in state.items() if isinstance(value, ExpertRows)}
    return experts, {name: value for name, value in state.items() if name not in experts}
