"""Routed transport: pieces of chunks follow `collectives.route`, handed on or added up by the ranks on their way.

Two versions start the messages: `on_host` from a thread, `on_stream` on a side stream of CUDA.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.moves import Moves
from hecate.collectives.route import Hop, Links, Part, gather_route, reduce_route
from hecate.collectives.staging import Staging
from hecate.collectives.summation import OrderedSum, accumulation_dtype
from hecate.collectives.transport import Rows, Transport, Work
from hecate.placement import Topology

__all__ = ["Pieces", "ReductionState", "Routed", "Waits", "hops_of", "nothing", "piece_of"]

Pieces = Sequence[tuple[Hop, Tensor]]
"""What travels, each with the memory it is sent from or received into."""

Waits = list[Callable[[], object]]


class Routed(Transport):
    """Follows the fastest route for each pair of placements. The route changes no bit of a sum."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology, links: Links) -> None:
        super().__init__(group, topology)
        self.links = links
        self._rank = group.rank()
        self._staging = Staging()

    def gather(self, moves: Moves, sent: Rows, received: Rows) -> Work:
        rows = {**received, **sent}
        if not rows:
            return Work(nothing)
        row = next(iter(rows.values()))
        return self._start_gather(self._gather_parts(moves, row.numel() * row.itemsize), rows, sent)

    def reduce(self, moves: Moves, contributed: Rows, sums: Rows, wire: torch.dtype) -> Work:
        rows = [*contributed.values(), *sums.values()]
        if not rows:
            return Work(nothing)
        parts = self._reduce_parts(moves, rows[0].numel(), wire)
        state = ReductionState(self._rank, self.topology, parts, contributed, sums, wire, self._staging)
        return self._start_reduce(parts, state, rows[0].device)

    def prepare_gather(self, moves: Moves, chunk_bytes: int) -> None:
        self._gather_parts(moves, chunk_bytes)

    def prepare_reduce(self, moves: Moves, numel: int, wire: torch.dtype) -> None:
        self._reduce_parts(moves, numel, wire)

    def _gather_parts(self, moves: Moves, chunk_bytes: int) -> Sequence[Part]:
        return gather_route(moves.src, moves.dst, self.topology, self.links, chunk_bytes).part(self._rank)

    def _reduce_parts(self, moves: Moves, numel: int, wire: torch.dtype) -> Sequence[Part]:
        sizes = (numel * wire.itemsize, numel * accumulation_dtype(wire).itemsize)
        return reduce_route(moves.src, moves.dst, self.topology, self.links, *sizes).part(self._rank)

    @abstractmethod
    def _start_gather(self, parts: Sequence[Part], rows: Rows, sent: Rows) -> Work:
        """Begin a gather of at least one row.

        Args:
            parts: what this rank does in each round.
            rows: all that it sends and receives; a row that it hands on is received first.
            sent: those that it has from the start.
        """

    @abstractmethod
    def _start_reduce(self, parts: Sequence[Part], state: ReductionState, device: torch.device) -> Work:
        """Begin a reduction of at least one row, all of them on `device`."""

    @abstractmethod
    def _post(self, sends: Pieces, receives: Pieces) -> Waits:
        """Start all these messages at once; returns one wait for each, sends first."""

    def _run_reduction(self, parts: Sequence[Part], state: ReductionState, ahead: int) -> None:
        """Run all rounds of a reduction.

        The receives of a round are started `ahead` rounds before it, so at most `ahead + 1` pieces per peer are staged.
        If `ahead`, pieces that can be received straight into the result are all started at once.
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


class ReductionState:
    """What one rank has added up, in one reduction, of the pieces that pass through it.

    A piece may come to its owner twice: to be added to a sum that the owner hands on like any other rank, and as part
    of the final result. These are two sums.
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
        """Whether the piece can be received straight into the output row: nothing to add, same dtype."""
        return hop.alone and self._sums[hop.expert].dtype == (self._wide if hop.partial else self._wire)

    def place(self, hop: Hop) -> Tensor:
        """The part of the output row that the piece is of."""
        return piece_of(self._sums[hop.expert], hop)

    def stage(self, hop: Hop) -> Tensor:
        """Memory to receive the piece in before it is added."""
        row = next(iter((self._contributed or self._sums).values()))
        span = hop.range_of(row.numel())
        return self._staging.take(span.stop - span.start, self._wide if hop.partial else self._wire, row.device)

    def payload(self, hop: Hop) -> Tensor:
        """What `hop` sends: this rank's own contribution, or the sum so far."""
        if not hop.partial:
            return piece_of(self._contributed[hop.expert], hop)
        total = self._under_way.pop((hop.expert, hop.piece, False)).result()
        assert total is not None
        return total

    def sent(self, hop: Hop, payload: Tensor) -> None:
        """Take back the memory of `payload`, which was sent."""
        if hop.partial:
            self._staging.give(payload)

    def add(self, hop: Hop, piece: Tensor) -> None:
        """Add what `hop` brought; if nothing more is missing from a result, write it."""
        key = (hop.expert, hop.piece, hop.final)
        if key not in self._under_way:
            self._under_way[key] = self._begin(hop)
        self._under_way[key].add(hop.first, piece, scratch=True, last=hop in self._last_of_node)
        if hop.final:
            self._missing[key[:2]] -= 1
            if not self._missing[key[:2]]:
                self._end(hop, self._under_way.pop(key).result())

    def finish(self) -> None:
        """Write the sums to which no other rank contributed."""
        for expert in self._untouched:
            if expert in self._contributed:
                self._sums[expert].copy_(self._contributed[expert])
            else:
                self._sums[expert].zero_()

    def _source(self, hop: Hop) -> tuple[int, int, bool, int]:
        """Which sum the piece is added to, and which node's part of it."""
        return hop.expert, hop.piece, hop.final, self._topology.node_of(hop.first)

    def _begin(self, hop: Hop) -> OrderedSum:
        """A new sum. This rank's own contribution goes to the sum that it hands on, if it does, else to the result."""
        passes = (hop.expert, hop.piece) in self._handed_on
        own = out = None
        if hop.expert in self._contributed and not (hop.final and passes):
            own = self._rank, piece_of(self._contributed[hop.expert], hop)
        if hop.final and self._sums[hop.expert].dtype == self._wide:
            out = self.place(hop)
        return OrderedSum(self._topology, self._staging, own, out)

    def _end(self, hop: Hop, total: Tensor | None) -> None:
        assert total is not None
        if self._sums[hop.expert].dtype != self._wide:
            self.place(hop).copy_(total)
            self._staging.give(total)


def hops_of(parts: Sequence[Part]) -> tuple[list[Hop], list[Hop]]:
    """All that is sent and all that is received, by round."""
    return [h for part in parts for h in part.sends], [h for part in parts for h in part.receives]


def piece_of(row: Tensor, hop: Hop) -> Tensor:
    """The elements of `row` that `hop` carries, a view."""
    return row[hop.range_of(row.numel())]


def nothing() -> None:
    """For a wait that has nothing to wait for."""
