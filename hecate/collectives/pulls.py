"""What each rank pulls from whom, when ranks read each other's memory: routes and moves -> frozen data.

A gather follows its route: a rank pulls a piece from the owner's slot, or from that of a rank that got it in an earlier
round and has it in its own slot for others. A reduction pulls from every contributor, in rank order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Generic, TypeVar

import numpy as np

from hecate.collectives.route import Hop, Links, gather_route
from hecate.placement import Placement, Topology

__all__ = ["GatherPulls", "Gathering", "Pull", "Reduction", "ReductionPulls", "Round", "gathering", "reduction"]

OWNED = 1
"""Level at which a rank's own rows are in its slot; what it got in round t is there at level t + 2."""


Part = TypeVar("Part")


class _ByRank(ABC, Generic[Part]):
    """What all ranks do; each rank's part is made when it is first asked for."""

    @property
    @abstractmethod
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Per rank, the experts that have a row in its slot, ascending."""

    @abstractmethod
    def _of(self, rank: int) -> Part: ...

    @property
    def most_rows(self) -> int:
        """Rows of the fullest slot."""
        return max(map(len, self.slots))

    def of(self, rank: int) -> Part:
        """What `rank` does."""
        if rank not in self._parts:
            self._parts[rank] = self._of(rank)
        return self._parts[rank]

    @cached_property
    def _parts(self) -> dict[int, Part]:
        return {}


@dataclass(frozen=True)
class Pull:
    """One rank reads a piece of a row.

    Attributes:
        hop: which piece, and the two ranks.
        row: row of the slot of `hop.src`.
        kept: row of the reader's own slot in which it keeps the piece for others; None: nobody pulls it from there.
    """

    hop: Hop
    row: int
    kept: int | None


@dataclass(frozen=True)
class Round:
    """What one rank does in one round.

    Attributes:
        awaits: (rank, level) that must be reached before.
        pulls: what it reads then.
        tells: ranks that pull some of that from here.
    """

    awaits: tuple[tuple[int, int], ...]
    pulls: tuple[Pull, ...]
    tells: tuple[int, ...]


@dataclass(frozen=True)
class GatherPulls:
    """One rank's part of a gather.

    Attributes:
        staged: (row of its slot, expert) of own experts that others pull.
        tells: ranks that pull them.
        rounds: as many on every rank.
        relayed: (row of its slot, expert) of experts that it keeps for others.
        sources: ranks from which it pulls.
        readers: ranks that pull from it.
    """

    staged: tuple[tuple[int, int], ...]
    tells: tuple[int, ...]
    rounds: tuple[Round, ...]
    relayed: tuple[tuple[int, int], ...]
    sources: tuple[int, ...]
    readers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Gathering(_ByRank[GatherPulls]):
    """A gather over all ranks.

    Attributes:
        owners: owner of each expert.
        rounds: hops by round.
        num_devices: number of ranks.
    """

    owners: tuple[int, ...]
    rounds: tuple[tuple[Hop, ...], ...]
    num_devices: int

    @cached_property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Per rank, the experts in its slot, ascending: own ones and those that it hands on."""
        held: list[set[int]] = [set() for _ in range(self.num_devices)]
        for hop in self._hops:
            held[hop.src].add(hop.expert)
        return tuple(tuple(sorted(experts)) for experts in held)

    @property
    def _hops(self) -> list[Hop]:
        return [hop for hops in self.rounds for hop in hops]

    @cached_property
    def _level(self) -> dict[tuple[int, int, int], int]:
        """(rank, expert, piece) -> level at which the piece is in the rank's slot, of pieces that are handed on."""
        return {(h.dst, h.expert, h.piece): t + OWNED + 1 for t, hops in enumerate(self.rounds) for h in hops}

    def _level_of(self, hop: Hop) -> int:
        return OWNED if self.owners[hop.expert] == hop.src else self._level[hop.src, hop.expert, hop.piece]

    def _of(self, rank: int) -> GatherPulls:
        row_of = [{expert: row for row, expert in enumerate(slot)} for slot in self.slots]
        sent = [h for h in self._hops if h.src == rank]
        told: dict[int, set[int]] = {}  # level -> ranks
        for hop in sent:
            told.setdefault(self._level_of(hop), set()).add(hop.dst)
        rounds = []
        for t, hops in enumerate(self.rounds):
            pulls = tuple(Pull(h, row_of[h.src][h.expert], row_of[rank].get(h.expert)) for h in hops if h.dst == rank)
            levels: dict[int, int] = {}
            for pull in pulls:
                levels[pull.hop.src] = max(levels.get(pull.hop.src, 0), self._level_of(pull.hop))
            rounds.append(Round(tuple(sorted(levels.items())), pulls, _sorted(told.get(t + OWNED + 1, set()))))
        rows = row_of[rank].items()
        return GatherPulls(
            staged=tuple((row, e) for e, row in rows if self.owners[e] == rank),
            tells=_sorted(told.get(OWNED, set())),
            rounds=tuple(rounds),
            relayed=tuple((row, e) for e, row in rows if self.owners[e] != rank),
            sources=_sorted({h.src for h in self._hops if h.dst == rank}),
            readers=_sorted({h.dst for h in sent}),
        )


@dataclass(frozen=True)
class ReductionPulls:
    """One rank's part of a reduction.

    Attributes:
        slot: experts with a row in its slot, ascending; every rank computes the same.
        leaving: (row of its slot, expert) of those that an owner elsewhere pulls.
        owners: ranks that pull from it.
        sums: (expert, ((rank, row of the rank's slot), ...) by ascending rank) of experts owned here that others hold.
        sources: ranks from which it pulls.
    """

    slot: tuple[int, ...]
    leaving: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]
    sums: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    sources: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Reduction(_ByRank[ReductionPulls]):
    """A reduction over all ranks.

    Attributes:
        owners: owner of each expert.
        holders: per expert that moves, the ranks that contribute, ascending.
        num_devices: number of ranks.
    """

    owners: tuple[int, ...]
    holders: dict[int, tuple[int, ...]]
    num_devices: int

    @cached_property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Per rank, the experts that have a row in its slot, ascending; also own ones, so that all are one matrix."""
        return tuple(tuple(e for e, ranks in self.holders.items() if rank in ranks) for rank in range(self.num_devices))

    def _of(self, rank: int) -> ReductionPulls:
        slots = self.slots
        leaving = tuple((row, e) for row, e in enumerate(slots[rank]) if self.owners[e] != rank)
        own = [e for e in self.holders if self.owners[e] == rank]
        sums = tuple((e, tuple((r, slots[r].index(e)) for r in self.holders[e])) for e in own)
        return ReductionPulls(
            slot=slots[rank],
            leaving=leaving,
            owners=_sorted({self.owners[e] for _, e in leaving}),
            sums=sums,
            sources=_sorted({r for e in own for r in self.holders[e]} - {rank}),
        )


def _sorted(ranks: set[int]) -> tuple[int, ...]:
    return tuple(sorted(ranks))


@lru_cache(maxsize=1024)
def gathering(src: Placement, dst: Placement, topology: Topology, links: Links, chunk_bytes: int) -> Gathering:
    """The gather from owners `src` to holders `dst`, by the fastest route for chunks of that size."""
    hops = gather_route(src, dst, topology, links, chunk_bytes).hops
    rounds: list[list[Hop]] = [[] for _ in range(int(hops[:, 0].max()) + 1 if len(hops) else 0)]
    for number, *numbers in hops.tolist():
        rounds[number].append(Hop.of(numbers))
    return Gathering(tuple(src.owners.tolist()), tuple(map(tuple, rounds)), src.num_devices)


@lru_cache(maxsize=1024)
def reduction(src: Placement, dst: Placement) -> Reduction:
    """The reduction from holders `src` to owners `dst`."""
    moving = np.flatnonzero((src - dst).matrix.any(axis=1)).tolist()
    holders = {e: tuple(np.flatnonzero(src.matrix[e]).tolist()) for e in moving}
    return Reduction(tuple(dst.owners.tolist()), holders, dst.num_devices)
