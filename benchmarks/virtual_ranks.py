"""Several ranks in one process: each has its own part of one device's memory and its own stream.

They follow the same plans by the same kernels as ranks of a node do, so that one GPU shows how fast these are; what a
link between GPUs takes it does not show. On the CPU there are no streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from torch import Tensor

from hecate.collectives.moves import Moves
from hecate.collectives.pulling import PullingRank
from hecate.collectives.pulls import gathering, reduction
from hecate.collectives.route import Links
from hecate.collectives.shared_memory import SLOTS, SharedMemory, block_bytes
from hecate.collectives.transport import Into, Rows
from hecate.placement import Topology

__all__ = ["VirtualRanks"]

_END = object()


class VirtualRanks:
    """The ranks of one node.

    A rank waits only for what was launched before: each step is launched for all ranks before the next one. Otherwise
    a kernel that waits could keep what it waits for from the device, since streams may share a hardware queue.

    Args:
        topology: one node.
        links: between the ranks, for routes.
        device: where all of them are.
        slot_bytes: bytes for the rows that a rank lets others read in one collective.
        engine_bytes: size from which on rows are pulled by copy engines; see `pull_rows`.
        timeout: of waits; on the CPU zero shows that nothing has to wait.
    """

    def __init__(
        self,
        topology: Topology,
        links: Links,
        device: torch.device,
        slot_bytes: int,
        engine_bytes: int | None = None,
        timeout: timedelta = timedelta(seconds=10),
    ) -> None:
        size = topology.num_devices
        blocks = [torch.zeros(block_bytes(slot_bytes), dtype=torch.uint8, device=device) for _ in range(size)]
        self._memory = SharedMemory(tuple(blocks), slot_bytes)
        self._topology, self._links = topology, links
        self._ranks = [PullingRank(rank, self._memory, topology, device, timeout, engine_bytes) for rank in range(size)]
        self._streams = [torch.cuda.Stream(device) for _ in range(size)] if device.type == "cuda" else None
        self._number = 0

    def gather(self, moves: Moves, sent: Sequence[Rows], received: Sequence[Rows]) -> None:
        """As `Transport.gather`, with the rows of each rank; complete for the current stream."""
        row = next(row for rows in sent for row in rows.values())
        everyones = gathering(moves.src, moves.dst, self._topology, self._links, row.nbytes)
        self._check_room(everyones.most_rows, row.nbytes)
        self._run(
            [rank.gather(self._number, everyones.of(i), sent[i], received[i]) for i, rank in enumerate(self._ranks)]
        )

    def room(self, moves: Moves, numel: int, wire: torch.dtype) -> list[Tensor]:
        """As `Transport.room_to_reduce`, of each rank."""
        everyones, slot = reduction(moves.src, moves.dst), self._number % SLOTS
        self._check_room(everyones.most_rows, numel * wire.itemsize)
        return [
            self._memory.rows(rank, slot, len(experts), numel, wire) for rank, experts in enumerate(everyones.slots)
        ]

    def accumulate(
        self, moves: Moves, contributed: Sequence[Rows], into: Sequence[Into], numel: int, wire: torch.dtype
    ) -> None:
        """As `Transport.accumulate`, with the rows of each rank; complete for the current stream."""
        everyones = reduction(moves.src, moves.dst)
        self._check_room(everyones.most_rows, numel * wire.itemsize)
        self._run(
            [
                rank.reduce(self._number, everyones.of(i), contributed[i], [into[i]], numel, wire)
                for i, rank in enumerate(self._ranks)
            ]
        )

    def _check_room(self, rows: int, row_bytes: int) -> None:
        if not self._memory.has_room(rows, row_bytes):
            raise ValueError(
                f"VirtualRanks: slot_bytes={self._memory.slot_bytes} have no room for {rows} rows of {row_bytes} bytes"
            )

    def _run(self, steps: Sequence[Iterator[None]]) -> None:
        """Launch step after step, each for all ranks."""
        self._number += 1
        for stream in self._streams or ():
            stream.wait_stream(torch.cuda.current_stream())
        running = True
        while running:
            running = False
            for rank, step in enumerate(steps):
                with self._on(rank):
                    running |= next(step, _END) is not _END
        for stream in self._streams or ():
            torch.cuda.current_stream().wait_stream(stream)

    def _on(self, rank: int) -> AbstractContextManager[object]:
        return nullcontext() if self._streams is None else torch.cuda.stream(self._streams[rank])
