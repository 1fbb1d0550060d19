"""Memory that every rank of a node can read and write: torch's symmetric memory on CUDA, files in RAM on the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.private_torch import map_symmetric, symmetric_empty
from hecate.ranks.agree import agree, gather

__all__ = ["SLOTS", "SharedMemory", "share"]

SLOTS = 2
"""Parts of a rank's memory that collectives use in turn, so that the next one may be packed while one is under way."""
MAX_RANKS = 256
_WORDS = 2 * MAX_RANKS
_HEADER = _WORDS * 8
_ALIGN = 16


@dataclass(frozen=True, eq=False)
class SharedMemory:
    """The memory of all ranks, as one rank sees it: words that only grow, then `SLOTS` slots of rows.

    Attributes:
        blocks: uint8 `[bytes]` of each rank, by rank; mapped into this process.
        slot_bytes: size of a slot.
        kept: what must live as long as the mappings.
    """

    blocks: tuple[Tensor, ...]
    slot_bytes: int
    kept: object = None

    def has_room(self, rows: int, row_bytes: int) -> bool:
        """Whether so many rows fit in a slot."""
        return rows * stride_of(row_bytes) <= self.slot_bytes

    def ready(self, reader: int, source: int) -> int:
        """Address of the word in `reader`'s memory that says how far `source` is with rows that `reader` pulls."""
        return self.blocks[reader].data_ptr() + 8 * source

    def done(self, source: int, reader: int) -> int:
        """Address of the word in `source`'s memory that counts collectives whose rows `reader` has pulled."""
        return self.blocks[source].data_ptr() + 8 * (MAX_RANKS + reader)

    def row(self, rank: int, slot: int, index: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Row `index`, of `numel` elements, in a slot of `rank`; rows begin at multiples of 16 bytes."""
        begin = _HEADER + slot * self.slot_bytes + index * stride_of(numel * dtype.itemsize)
        return self.blocks[rank][begin : begin + numel * dtype.itemsize].view(dtype)

    def rows(self, rank: int, slot: int, count: int, numel: int, dtype: torch.dtype) -> Tensor:
        """The first rows of a slot, `[count, numel]`."""
        stride = stride_of(numel * dtype.itemsize)
        begin = _HEADER + slot * self.slot_bytes
        return self.blocks[rank][begin : begin + count * stride].view(count, stride).view(dtype)[:, :numel]


def stride_of(row_bytes: int) -> int:
    """Bytes from one row of a slot to the next."""
    return -(-row_bytes // _ALIGN) * _ALIGN


def block_bytes(slot_bytes: int) -> int:
    """Size of a rank's memory."""
    return _HEADER + SLOTS * slot_bytes


def share(slot_bytes: int, device: torch.device, group: dist.ProcessGroup) -> SharedMemory:
    """Allocate memory that all ranks of `group` see, with all words zero. Collective; the host waits.

    Args:
        slot_bytes: size of a slot, a multiple of 16, the same on all ranks.
        device: this rank's device.
        group: process group of ranks in one node.

    Raises:
        RuntimeError: this torch has no symmetric memory, or some rank cannot map another's memory; on all ranks.
    """
    if device.type == "cpu":
        return SharedMemory(_share_files(block_bytes(slot_bytes), group), slot_bytes)
    with torch.inference_mode(False):
        own = agree(lambda: symmetric_empty(block_bytes(slot_bytes), device), group)
    own[:_HEADER].zero_()
    torch.cuda.synchronize(device)  # before another rank can write a word
    blocks, kept = agree(lambda: map_symmetric(own, group), group)
    return SharedMemory(tuple(blocks), slot_bytes, kept)


def _share_files(num_bytes: int, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """A file in RAM per rank, mapped by all and then unlinked."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    own = folder / f"hecate-{uuid4()}"
    try:
        agree(lambda: _make_file(own, num_bytes), group)
        paths = gather(str(own), group)
        return agree(lambda: _map_files(paths, num_bytes), group)
    finally:
        own.unlink(missing_ok=True)


def _make_file(path: Path, num_bytes: int) -> None:
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)  # of zeros; an error here, where a full disk would be a signal


def _map_files(paths: Sequence[str], num_bytes: int) -> tuple[Tensor, ...]:
    for rank, path in enumerate(paths):
        if not Path(path).exists():
            raise RuntimeError(f"the memory of rank {rank} cannot be mapped here: {path} is not on this machine")
    with torch.inference_mode(False):
        return tuple(torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path in paths)
