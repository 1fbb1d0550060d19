"""Transport inside a node by memory that all ranks share: ranks read rows from each other, and flags say when.

No rank sends anything. A gather reads owners' rows, or those of ranks that got them earlier (`collectives.pulls`); a
reduction reads contributions in rank order and adds them in the owner's rows, so that no sum is staged. On CUDA the
memory is torch's symmetric memory, on the CPU a file in RAM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.moves import Moves
from hecate.collectives.pulling import PullingRank
from hecate.collectives.pulls import Gathering, gathering, reduction
from hecate.collectives.queue import HostQueue
from hecate.collectives.route import Links
from hecate.collectives.routed import nothing
from hecate.collectives.shared_memory import SLOTS, SharedMemory, share, stride_of
from hecate.collectives.side_stream import SideStream
from hecate.collectives.summation import accumulation_dtype
from hecate.collectives.transport import Into, Rows, Transport, Work
from hecate.ops.kernels.stack import KindRows
from hecate.placement import Topology

__all__ = ["ADDED", "Symmetric"]

ADDED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose sums there is a kernel for."""
PAGE = 2**21
"""Slots are multiples of the size in which CUDA maps memory."""


class Symmetric(Transport):
    """Making one is collective, and the host waits; so it does when rows outgrow the memory, on all ranks at once.

    Before a gather or a reduction whose rows may be larger than any before, all ranks call `room_to_gather` or
    `room_to_reduce`.

    Args:
        group: process group of ranks in one node.
        topology: which ranks share a node.
        links: between the devices; routes are made for them.
        device: of the rows.
        timeout: after which a rank that does not come to a collective is an error.

    Raises:
        RuntimeError: see `share`; on all ranks.
    """

    def __init__(
        self, group: dist.ProcessGroup, topology: Topology, links: Links, device: torch.device, timeout: timedelta
    ) -> None:
        super().__init__(group, topology)
        self.links, self.device = links, device
        self._rank, self._timeout = group.rank(), timeout
        self._number = 0  # of the next collective
        self._runner: _OnStream | _OnHost = _OnStream(device) if device.type == "cuda" else _OnHost()
        self._memory, self._pulling = self._share(PAGE)

    def room_to_gather(self, moves: Moves, numel: int, dtype: torch.dtype) -> None:
        self._reserve(self._gathering(moves, numel * dtype.itemsize).most_rows, numel * dtype.itemsize)

    def room_to_reduce(self, moves: Moves, numel: int, wire: torch.dtype) -> Tensor:
        everyones, slot = reduction(moves.src, moves.dst), self._number % SLOTS
        self._reserve(everyones.most_rows, numel * wire.itemsize)
        self._runner.wait_for(slot)  # until nobody reads what was in it before
        return self._memory.rows(self._rank, slot, len(everyones.of(self._rank).slot), numel, wire)

    def gather(self, moves: Moves, sent: Rows, received: Rows) -> Work:
        number, row = self._next(), next(iter((*sent.values(), *received.values())), None)
        if row is None:
            return Work(nothing)
        everyones = self._gathering(moves, row.nbytes)
        self._check_room(everyones.most_rows, row.nbytes)
        return self._start(number, self._pulling.gather(number, everyones.of(self._rank), sent, received))

    def reduce(self, moves: Moves, contributed: Rows, sums: Rows, wire: torch.dtype) -> Work:
        rows = [*contributed.values(), *sums.values()]
        if not rows:
            self._next()
            return Work(nothing)
        wide = accumulation_dtype(wire)
        pulled = {e for e, _ in reduction(moves.src, moves.dst).of(self._rank).sums}
        exact = {e: row if row.dtype == wide else row.to(wide) for e, row in sums.items() if e in pulled}
        into = [Into([KindRows(row.unsqueeze(0), 0)], {e: 0}, overwrite=True) for e, row in exact.items()]

        def finish() -> None:
            for e, row in sums.items():
                if e in contributed or e in exact:
                    row.copy_(exact.get(e, contributed.get(e)))  # type: ignore[arg-type]  # one of them is there
                else:
                    row.zero_()

        return self._reduce(moves, contributed, into, rows[0].numel(), wire, finish)

    def accumulates(self, wire: torch.dtype, dtype: torch.dtype) -> bool:
        return wire in ADDED and dtype == accumulation_dtype(wire)

    def accumulate(self, moves: Moves, contributed: Rows, into: Into, numel: int, wire: torch.dtype) -> Work:
        return self._reduce(moves, contributed, [into], numel, wire, nothing)

    def prepare_gather(self, moves: Moves, chunk_bytes: int) -> None:
        self._gathering(moves, chunk_bytes).of(self._rank)

    def prepare_reduce(self, moves: Moves, numel: int, wire: torch.dtype) -> None:
        reduction(moves.src, moves.dst).of(self._rank)

    def close(self) -> None:
        """End the CPU's thread, after what was started."""
        self._runner.close()

    def _reduce(
        self,
        moves: Moves,
        contributed: Rows,
        into: Sequence[Into],
        numel: int,
        wire: torch.dtype,
        finish: Callable[[], None],
    ) -> Work:
        if wire not in ADDED:
            raise TypeError(f"Symmetric.reduce: wire={wire}; must be one of {', '.join(map(str, ADDED))}")
        number, everyones = self._next(), reduction(moves.src, moves.dst)
        self._check_room(everyones.most_rows, numel * wire.itemsize)
        pulls = everyones.of(self._rank)

        def steps() -> Iterator[None]:
            yield from self._pulling.reduce(number, pulls, contributed, into, numel, wire)
            finish()

        return self._start(number, steps())

    def _gathering(self, moves: Moves, chunk_bytes: int) -> Gathering:
        return gathering(moves.src, moves.dst, self.topology, self.links, chunk_bytes)

    def _next(self) -> int:
        number, self._number = self._number, self._number + 1
        return number

    def _start(self, number: int, steps: Iterator[None]) -> Work:
        def run() -> None:
            for _ in steps:
                pass

        return self._runner.start(run, number % SLOTS)

    def _reserve(self, rows: int, row_bytes: int) -> None:
        """Enlarge the memory if the slots are too small. Collective if they are."""
        if not self._memory.has_room(rows, row_bytes):
            self._runner.drain()
            self._memory, self._pulling = self._share(-(-rows * stride_of(row_bytes) // PAGE) * PAGE)

    def _check_room(self, rows: int, row_bytes: int) -> None:
        if not self._memory.has_room(rows, row_bytes):
            raise RuntimeError(
                f"Symmetric: slots of {self._memory.slot_bytes} bytes have no room for {rows} rows of {row_bytes} "
                "bytes; all ranks must call room_to_gather or room_to_reduce before"
            )

    def _share(self, slot_bytes: int) -> tuple[SharedMemory, PullingRank]:
        memory = share(slot_bytes, self.device, self.group)
        return memory, PullingRank(self._rank, memory, self.topology, self.device, self._timeout)


class _OnHost:
    """Runs collectives in a thread, one after the other."""

    def __init__(self) -> None:
        self._queue = HostQueue()
        self._last: dict[int, Work] = {}

    def start(self, run: Callable[[], None], slot: int) -> Work:
        self._last[slot] = work = self._queue.start(run)
        return work

    def wait_for(self, slot: int) -> None:
        if slot in self._last:
            self._last.pop(slot).wait()

    def drain(self) -> None:
        for slot in list(self._last):
            self.wait_for(slot)

    def close(self) -> None:
        self._queue.close()


class _OnStream:
    """Runs collectives on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._side, self._device = SideStream(), device
        self._ends: dict[int, torch.cuda.Event] = {}

    def start(self, run: Callable[[], None], slot: int) -> Work:
        work = self._side.run(run, self._device)
        assert self._side.last is not None
        self._ends[slot] = self._side.last
        return work

    def wait_for(self, slot: int) -> None:
        if slot in self._ends:
            torch.cuda.current_stream(self._device).wait_event(self._ends[slot])

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        pass
