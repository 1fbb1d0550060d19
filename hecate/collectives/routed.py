"""Routed transport: follows `collectives.route`, over torch.distributed point-to-point calls.

gloo (CPU): a thread of the transport follows the routes, one after the other, so that pieces are handed on while the
caller computes. NCCL (CUDA): each round is one group call on a side stream; the host waits for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.order import OrderedSum, accumulation_dtype
from hecate.collectives.route import Hop, Links, Part, gather_route, reduce_route
from hecate.collectives.schedule import Schedule
from hecate.collectives.transport import Rows, Transport, Work
from hecate.placement import Topology

__all__ = ["Routed"]

Waits = list[Callable[[], object]]


class Routed(Transport):
    """Pieces in rounds; sums have the same bits as those of `PointToPoint` with the same topology."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology, links: Links) -> None:
        super().__init__(group, topology)
        self.links = links
        self._rank = group.rank()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hecate-collectives")
        self._stream: torch.cuda.Stream | None = None

    def gather(self, schedule: Schedule, sent: Rows, received: Rows) -> Work:
        rows = {**received, **sent}
        if not rows:
            return Work(lambda: None)
        row = next(iter(rows.values()))
        route = gather_route(schedule.src, schedule.dst, self.topology, self.links, row.numel() * row.itemsize)
        parts = route.part(self._rank)
        hand_on = self._gather_in_rounds if row.is_cuda else self._gather_when_ready
        return self._start(lambda: hand_on(parts, rows), row.device)

    def reduce(self, schedule: Schedule, contributed: Rows, sums: Rows, wire: torch.dtype) -> Work:
        rows = [*contributed.values(), *sums.values()]
        if not rows:
            return Work(lambda: None)
        numel, wide = rows[0].numel(), accumulation_dtype(wire)
        sizes = (numel * wire.itemsize, numel * wide.itemsize)
        route = reduce_route(schedule.src, schedule.dst, self.topology, self.links, *sizes)
        parts = route.part(self._rank)
        state = _Reduction(self._rank, self.topology, parts, contributed, sums, wire)
        # On NCCL a receive before the sends of its round would keep the stream from them.
        ahead = 0 if rows[0].is_cuda else 1
        return self._start(lambda: self._reduce(parts, state, ahead), rows[0].device)

    def _start(self, run: Callable[[], None], device: torch.device) -> Work:
        if device.type != "cuda":
            return Work(self._thread.submit(run).result)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
            done = torch.cuda.Event()
            done.record()
        return Work(lambda: torch.cuda.current_stream().wait_event(done))

    def _gather_when_ready(self, parts: Sequence[Part], rows: Rows) -> None:
        """Receives go to their final place, so all are open from the start; a send waits only for what it carries."""
        arriving = {}
        for hop in (h for part in parts for h in part.receives):
            (arriving[hop.expert, hop.piece],) = self._post([], [(hop, _piece(rows[hop.expert], hop))])
        sending: Waits = []
        for hop in (h for part in parts for h in part.sends):
            arriving.pop((hop.expert, hop.piece), _nothing)()
            sending += self._post([(hop, _piece(rows[hop.expert], hop))], [])
        for wait in (*arriving.values(), *sending):
            wait()

    def _gather_in_rounds(self, parts: Sequence[Part], rows: Rows) -> None:
        for part in parts:
            sends, receives = ([(h, _piece(rows[h.expert], h)) for h in hops] for hops in (part.sends, part.receives))
            for wait in self._post(sends, receives):
                wait()

    def _reduce(self, parts: Sequence[Part], state: _Reduction, ahead: int) -> None:
        """Receives of a round are open `ahead` rounds before: two pieces of a peer are staged at most."""
        staged: dict[int, list[tuple[Hop, Tensor]]] = {}
        arriving: dict[int, Waits] = {}
        sending: Waits = []
        for i in range(len(parts) + ahead):
            now = i - ahead
            staged[i] = [(h, state.staging(h)) for h in parts[i].receives] if i < len(parts) else []
            payloads = [(h, state.payload(h)) for h in parts[now].sends] if now >= 0 else []
            works = self._post(payloads, staged[i])
            arriving[i] = works[len(payloads) :]
            for wait in (*arriving.pop(now, ()), *sending):
                wait()
            sending = works[: len(payloads)]
            for hop, piece in staged.pop(now, ()):
                state.add(hop, piece)
        for wait in sending:
            wait()
        state.finish()

    def _post(self, sends: Sequence[tuple[Hop, Tensor]], receives: Sequence[tuple[Hop, Tensor]]) -> Waits:
        """Start all at once; one wait each, sends first. On CUDA one wait of the stream stands for all of them."""
        operations = [self._operation(dist.isend, piece, hop.dst) for hop, piece in sends]
        operations += [self._operation(dist.irecv, piece, hop.src) for hop, piece in receives]
        works = dist.batch_isend_irecv(operations) if operations else []
        if len(works) == len(operations):
            return [work.wait for work in works]
        for work in works:
            work.wait()
        return [_nothing] * len(operations)

    def _operation(self, operation: Callable[..., object], piece: Tensor, peer: int) -> dist.P2POp:
        # Bytes, so that every dtype travels on every backend.
        return dist.P2POp(operation, piece.view(torch.uint8), group=self.group, group_peer=peer)


class _Reduction:
    """What one rank has added up of the pieces that pass it.

    A piece may pass the owner twice: on the way, as anybody's, and as part of the final result.
    """

    def __init__(
        self,
        rank: int,
        topology: Topology,
        parts: Sequence[Part],
        contributed: Rows,
        sums: Rows,
        wire: torch.dtype,
    ) -> None:
        self._rank, self._topology, self._contributed, self._sums, self._wire = rank, topology, contributed, sums, wire
        self._under_way: dict[tuple[int, int, bool], OrderedSum] = {}
        self._handed_on = {(h.expert, h.piece) for part in parts for h in part.sends}
        self._missing = Counter((h.expert, h.piece) for part in parts for h in part.receives if h.final)
        self._untouched = sums.keys() - {expert for expert, _ in self._missing}

    def staging(self, hop: Hop) -> Tensor:
        """Memory for what `hop` brings."""
        numel = self._any_row.numel()
        span = hop.range_of(numel)
        dtype = accumulation_dtype(self._wire) if hop.partial else self._wire
        return torch.empty(span.stop - span.start, dtype=dtype, device=self._any_row.device)

    def payload(self, hop: Hop) -> Tensor:
        """What `hop` carries away: the own contribution, or the sum so far."""
        if not hop.partial:
            return _piece(self._contributed[hop.expert], hop)
        total = self._under_way.pop((hop.expert, hop.piece, False)).result()
        assert total is not None
        return total

    def add(self, hop: Hop, piece: Tensor) -> None:
        """Add what `hop` brought; write the result when nothing is missing."""
        key = (hop.expert, hop.piece, hop.final)
        if key not in self._under_way:
            self._under_way[key] = OrderedSum(self._topology, self._own(hop))
        self._under_way[key].add(hop.first, piece, scratch=True)
        if hop.final:
            self._missing[key[:2]] -= 1
            if not self._missing[key[:2]]:
                total = self._under_way.pop(key).result()
                assert total is not None
                _piece(self._sums[hop.expert], hop).copy_(total)

    def finish(self) -> None:
        """Write the sums to which nobody else contributed."""
        for expert in self._untouched:
            if expert in self._contributed:
                self._sums[expert].copy_(self._contributed[expert])
            else:
                self._sums[expert].zero_()

    def _own(self, hop: Hop) -> tuple[int, Tensor] | None:
        """The own contribution, where it belongs to this sum: to the one handed on if there is one."""
        passes = (hop.expert, hop.piece) in self._handed_on
        if hop.expert not in self._contributed or (hop.final and passes):
            return None
        return self._rank, _piece(self._contributed[hop.expert], hop)

    @property
    def _any_row(self) -> Tensor:
        return next(iter((self._contributed or self._sums).values()))


def _piece(row: Tensor, hop: Hop) -> Tensor:
    return row[hop.range_of(row.numel())]


def _nothing() -> None:
    return None
