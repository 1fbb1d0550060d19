"""Routed transport: follows `collectives.route`, over torch.distributed point-to-point calls.

gloo (CPU): a rank that hands nothing on starts all it has to do at the call. Otherwise a thread of the group follows
the routes, one after the other, so that pieces are handed on while the caller computes. NCCL (CUDA): each round
is one group call on a side stream; the host waits for nothing.

Why group calls cannot wait for each other in a circle: NCCL ends one when all its peers have entered the one that has
the other half of each message, on first use of a connection also on the host. Both halves of a hop are in the group
call of the same call and round, and every rank enters its own in ascending order of (call, round), whichever of them
it takes part in. So of all that are not done, the first one everywhere is entered by all its ranks, and ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.order import OrderedSum, Staging, accumulation_dtype
from hecate.collectives.route import Hop, Links, Part, gather_route, reduce_route
from hecate.collectives.schedule import Schedule
from hecate.collectives.transport import Rows, Transport, Work
from hecate.collectives.turns import Turns
from hecate.placement import Topology

__all__ = ["Routed"]

Waits = list[Callable[[], object]]


class Routed(Transport):
    """Pieces in rounds; sums have the same bits as those of `PointToPoint` with the same topology."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology, links: Links) -> None:
        super().__init__(group, topology)
        self.links = links
        self._rank = group.rank()
        self._turns = Turns.of(group)
        self._staging = Staging()
        self._stream: torch.cuda.Stream | None = None

    def gather(self, schedule: Schedule, sent: Rows, received: Rows) -> Work:
        rows = {**received, **sent}
        if not rows:
            return Work(lambda: None)
        row = next(iter(rows.values()))
        route = gather_route(schedule.src, schedule.dst, self.topology, self.links, row.numel() * row.itemsize)
        parts = route.part(self._rank)
        if self._by_group_calls(row):
            return self._on_stream(lambda: self._gather_in_rounds(parts, rows), row.device)
        sends, receives = _hops(parts)
        if self._turns.idle and all(h.expert in sent for h in sends):
            return self._at_once(*([(h, _piece(rows[h.expert], h)) for h in hops] for hops in (sends, receives)))
        return self._turns.start(lambda: self._gather_when_ready(parts, rows))

    def reduce(self, schedule: Schedule, contributed: Rows, sums: Rows, wire: torch.dtype) -> Work:
        rows = [*contributed.values(), *sums.values()]
        if not rows:
            return Work(lambda: None)
        numel, wide = rows[0].numel(), accumulation_dtype(wire)
        sizes = (numel * wire.itemsize, numel * wide.itemsize)
        route = reduce_route(schedule.src, schedule.dst, self.topology, self.links, *sizes)
        parts = route.part(self._rank)
        state = _Reduction(self._rank, self.topology, parts, contributed, sums, wire, self._staging)
        if self._by_group_calls(rows[0]):
            # On NCCL a receive before the sends of its round would keep the stream from them.
            return self._on_stream(lambda: self._reduce(parts, state, ahead=0), rows[0].device)
        sends, receives = _hops(parts)
        if self._turns.idle and not any(h.partial for h in sends) and all(map(state.in_place, receives)):
            work = self._at_once([(h, state.payload(h)) for h in sends], [(h, state.place(h)) for h in receives])
            state.finish()
            return work
        return self._turns.start(lambda: self._reduce(parts, state, ahead=1))

    def _at_once(self, sends: Sequence[tuple[Hop, Tensor]], receives: Sequence[tuple[Hop, Tensor]]) -> Work:
        waits = self._post(sends, receives)

        def finish() -> None:
            for wait in waits:
                wait()

        return Work(finish)

    def _by_group_calls(self, row: Tensor) -> bool:
        """Whether a round is one operation of the backend, which starts and ends as a whole."""
        return row.is_cuda

    def _on_stream(self, run: Callable[[], None], device: torch.device) -> Work:
        """`run` on the side stream, behind what the caller's stream was given so far.

        The rows belong to the caller's stream: once freed, they are that stream's next tensors, whatever the side
        stream still does with them. So the work holds them, by `run`, until `wait()`. `Tensor.record_stream` would be
        safe too, but gives memory back when the device gets there, at another moment on every rank and in every step;
        FSDP2 holds references as well. What is staged is allocated for the side stream, and used only there.
        """
        caller = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        side = self._stream
        side.wait_stream(caller)
        try:
            with torch.cuda.stream(side):
                run()
        except BaseException:
            caller.wait_stream(side)  # what was started before the error still uses the rows
            raise
        done = side.record_event()

        def finish(held: object = run) -> None:
            # Memory goes back to the caller's stream, also where another one waits for the results.
            for stream in {caller, torch.cuda.current_stream(device)}:
                stream.wait_event(done)

        return Work(finish)

    def _gather_when_ready(self, parts: Sequence[Part], rows: Rows) -> None:
        """Receives go to their final place, so all are open from the start; a send waits only for what it carries."""
        receives = [(h, _piece(rows[h.expert], h)) for part in parts for h in part.receives]
        waits = self._post([], receives)
        arriving = {(h.expert, h.piece): wait for (h, _), wait in zip(receives, waits, strict=True)}
        sending: Waits = []
        for hop in (h for part in parts for h in part.sends):
            arriving.pop((hop.expert, hop.piece), _nothing)()
            sending += self._post([(hop, _piece(rows[hop.expert], hop))], [])
        for wait in (*arriving.values(), *sending):
            wait()

    def _gather_in_rounds(self, parts: Sequence[Part], rows: Rows) -> None:
        """Each round's sends and receives together, as one group call; the next round is behind it on the stream."""
        for part in parts:
            sends, receives = ([(h, _piece(rows[h.expert], h)) for h in hops] for hops in (part.sends, part.receives))
            for wait in self._post(sends, receives):
                wait()

    def _reduce(self, parts: Sequence[Part], state: _Reduction, ahead: int) -> None:
        """Receives of a round are open `ahead` rounds before: two pieces of a peer are staged at most.

        What nothing is added to goes to its final place, and is open from the start where that is possible.
        """
        in_place = {h for part in parts for h in part.receives if ahead and state.in_place(h)}
        placed = self._post([], [(h, state.place(h)) for part in parts for h in part.receives if h in in_place])
        staged: dict[int, list[tuple[Hop, Tensor]]] = {}
        arriving: dict[int, Waits] = {}
        sending: Waits = []
        payloads: list[tuple[Hop, Tensor]] = []
        for i in range(len(parts) + ahead):
            now = i - ahead
            receives = [h for h in parts[i].receives if h not in in_place] if i < len(parts) else []
            staged[i] = [(h, state.stage(h)) for h in receives]
            before, payloads = payloads, [(h, state.payload(h)) for h in parts[now].sends] if now >= 0 else []
            works = self._post(payloads, staged[i])
            arriving[i] = works[len(payloads) :]
            for wait in (*arriving.pop(now, ()), *sending):
                wait()
            sending = works[: len(payloads)]
            for hop, payload in before:
                state.sent(hop, payload)
            for hop, piece in staged.pop(now, ()):
                state.add(hop, piece)
        for wait in (*sending, *placed):
            wait()
        for hop, payload in payloads:
            state.sent(hop, payload)
        state.finish()

    def _post(self, sends: Sequence[tuple[Hop, Tensor]], receives: Sequence[tuple[Hop, Tensor]]) -> Waits:
        """Start all at once; one wait each, sends first. Of a group call one wait of the stream stands for all."""
        first = next((piece for _, piece in (*sends, *receives)), None)
        if first is None:
            return []
        if self._by_group_calls(first):
            return self._group_call(sends, receives)
        group, works = self.group, []
        for hop, piece in sends:
            data = piece.view(torch.uint8)  # so that every dtype travels on every backend
            works.append(dist.isend(data, group=group, tag=_tag(hop, data.numel()), group_dst=hop.dst))
        for hop, piece in receives:
            data = piece.view(torch.uint8)
            works.append(dist.irecv(data, group=group, tag=_tag(hop, data.numel()), group_src=hop.src))
        return [work.wait for work in works if work is not None]

    def _group_call(self, sends: Sequence[tuple[Hop, Tensor]], receives: Sequence[tuple[Hop, Tensor]]) -> Waits:
        def operation(run: Callable[..., object], piece: Tensor, peer: int) -> dist.P2POp:
            return dist.P2POp(run, piece.view(torch.uint8), group=self.group, group_peer=peer)

        operations = [operation(dist.isend, piece, hop.dst) for hop, piece in sends]
        operations += [operation(dist.irecv, piece, hop.src) for hop, piece in receives]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return [_nothing] * len(operations)


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
        staging: Staging,
    ) -> None:
        self._rank, self._topology, self._staging = rank, topology, staging
        self._contributed, self._sums, self._wire, self._wide = contributed, sums, wire, accumulation_dtype(wire)
        self._under_way: dict[tuple[int, int, bool], OrderedSum] = {}
        self._handed_on = {(h.expert, h.piece) for part in parts for h in part.sends}
        self._missing = Counter((h.expert, h.piece) for part in parts for h in part.receives if h.final)
        self._untouched = sums.keys() - {expert for expert, _ in self._missing}
        self._last_of_node = set({self._source(h): h for part in parts for h in part.receives}.values())

    def in_place(self, hop: Hop) -> bool:
        """Whether what `hop` brings is the result as it is."""
        return hop.alone and self._sums[hop.expert].dtype == (self._wide if hop.partial else self._wire)

    def place(self, hop: Hop) -> Tensor:
        """Where it goes then."""
        return _piece(self._sums[hop.expert], hop)

    def stage(self, hop: Hop) -> Tensor:
        """Memory for what `hop` brings."""
        row = next(iter((self._contributed or self._sums).values()))
        span = hop.range_of(row.numel())
        return self._staging.take(span.stop - span.start, self._wide if hop.partial else self._wire, row.device)

    def payload(self, hop: Hop) -> Tensor:
        """What `hop` carries away: the own contribution, or the sum so far."""
        if not hop.partial:
            return _piece(self._contributed[hop.expert], hop)
        total = self._under_way.pop((hop.expert, hop.piece, False)).result()
        assert total is not None
        return total

    def sent(self, hop: Hop, payload: Tensor) -> None:
        """`payload` is not needed any more."""
        if hop.partial:
            self._staging.give(payload)

    def add(self, hop: Hop, piece: Tensor) -> None:
        """Add what `hop` brought; end the result when nothing is missing."""
        key = (hop.expert, hop.piece, hop.final)
        if key not in self._under_way:
            self._under_way[key] = self._begin(hop)
        self._under_way[key].add(hop.first, piece, scratch=True, last=hop in self._last_of_node)
        if hop.final:
            self._missing[key[:2]] -= 1
            if not self._missing[key[:2]]:
                self._end(hop, self._under_way.pop(key).result())

    def finish(self) -> None:
        """Write the sums to which nobody else contributed."""
        for expert in self._untouched:
            if expert in self._contributed:
                self._sums[expert].copy_(self._contributed[expert])
            else:
                self._sums[expert].zero_()

    def _source(self, hop: Hop) -> tuple[int, int, bool, int]:
        """The sum that it adds to, and of which node it adds."""
        return hop.expert, hop.piece, hop.final, self._topology.node_of(hop.first)

    def _begin(self, hop: Hop) -> OrderedSum:
        """With the own contribution, where it belongs to this sum: to the one handed on if there is one."""
        passes = (hop.expert, hop.piece) in self._handed_on
        own = out = None
        if hop.expert in self._contributed and not (hop.final and passes):
            own = self._rank, _piece(self._contributed[hop.expert], hop)
        if hop.final and self._sums[hop.expert].dtype == self._wide:
            out = self.place(hop)
        return OrderedSum(self._topology, self._staging, own, out)

    def _end(self, hop: Hop, total: Tensor | None) -> None:
        assert total is not None
        if self._sums[hop.expert].dtype != self._wide:
            self.place(hop).copy_(total)
            self._staging.give(total)


def _hops(parts: Sequence[Part]) -> tuple[list[Hop], list[Hop]]:
    """What is sent and what is received, by round."""
    return [h for part in parts for h in part.sends], [h for part in parts for h in part.receives]


def _piece(row: Tensor, hop: Hop) -> Tensor:
    return row[hop.range_of(row.numel())]


def _tag(hop: Hop, num_bytes: int) -> int:
    """Apart for each kind of result that may be received before its turn; messages of one tag keep their order.

    And one a size: gloo takes a shorter message for a longer one, whereas ranks that disagree on a tag time out.
    """
    return 4 * (num_bytes % 2**29) + (1 + hop.partial if hop.alone else 0)


def _nothing() -> None:
    return None
