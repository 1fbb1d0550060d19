"""How chunks travel: placements, topology and links -> frozen rounds of hops (docs/design.md, decision 7).

A gather relays pieces inside nodes, so that an expert crosses each node border once; a reduction sums on the way, in
the order of `collectives.summation`. The search is in C++ (csrc/collectives) and deterministic: every rank finds the
same route. It chooses the shape that is fastest by its model of the links. Plain sends are one of the shapes, so the
chosen one is never slower than these in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from hecate._native import route as find_route
from hecate.cost import CostModel
from hecate.placement import Placement, Topology

__all__ = ["Hop", "Links", "Part", "Route", "gather_route", "reduce_route"]


@dataclass(frozen=True)
class Links:
    """The links between devices, in each direction. A link serializes its messages; different links run in parallel.

    Attributes:
        device: bytes per second into or out of one device, inside its node.
        fabric: bytes per second between all devices of a node together.
        crossing: bytes per second of one device out of or into its node.
        border: bytes per second out of or into a node, all its devices together.
        message_ns: fixed cost of a message to sender and receiver, nanoseconds.
        relay_ns: from the arrival of a piece until it is on its way again, nanoseconds.
    """

    device: int
    fabric: int
    crossing: int
    border: int
    message_ns: int
    relay_ns: int

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name.endswith("_ns") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Links.{f.name}={value!r}: must be an integer >= {least}")

    @classmethod
    def of(cls, cost: CostModel, topology: Topology, device_type: str) -> Links:
        """The links of a cost model: one network port per device; processes on CPU share one, and their memory."""
        per_node = topology.devices_per_node
        return cls(
            device=cost.intra_node_bandwidth,
            fabric=cost.intra_node_bandwidth * (1 if device_type == "cpu" else per_node),
            crossing=cost.inter_node_bandwidth,
            border=cost.inter_node_bandwidth * (1 if device_type == "cpu" else per_node),
            message_ns=cost.message_ns,
            relay_ns=cost.message_ns,
        )


@dataclass(frozen=True)
class Hop:
    """One message: a piece of one expert's chunk goes from device `src` to device `dst`.

    Attributes:
        expert: its id.
        piece, pieces: the piece's number, and how many the chunk is cut into.
        src, dst: devices.
        first: in reductions, the lowest device whose contribution is in it.
        partial: in reductions, whether it is a sum of several contributions, in accumulation dtype; a single one is in
            wire dtype.
        final: in reductions, whether it is added to the owner's result, not to a sum that the owner hands on.
        alone: in reductions, whether it is the owner's result, to which nothing is added.
    """

    expert: int
    piece: int
    pieces: int
    src: int
    dst: int
    first: int
    partial: bool
    final: bool
    alone: bool

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Hop:
        """The hop of a row of `Route.hops` without its round."""
        expert, piece, pieces, src, dst, first, *flags = numbers
        return cls(expert, piece, pieces, src, dst, first, *map(bool, flags))

    def range_of(self, numel: int) -> slice:
        """Which elements of a chunk of `numel` elements it carries."""
        return slice(numel * self.piece // self.pieces, numel * (self.piece + 1) // self.pieces)


@dataclass(frozen=True)
class Part:
    """The messages of one device in one round."""

    sends: tuple[Hop, ...]
    receives: tuple[Hop, ...]


@dataclass(frozen=True, eq=False)
class Route:
    """Hops in rounds. A hop carries only what its sender had from the start or got in an earlier round.

    Attributes:
        hops: read-only int64 `[hops, 10]`, by round: the round, then the attributes of `Hop` in their order.
        shape: the chosen shape, in words.
        predicted_ns: how long the route takes, by the model of the links.
        direct_ns: how long plain sends would take, by the same model; at least `predicted_ns`.
        bound_ns: a lower bound for any route: the bytes that must enter or leave one device or node, divided by its
            bandwidth; the largest of these.
    """

    hops: NDArray[np.int64]
    shape: str
    predicted_ns: int
    direct_ns: int
    bound_ns: int

    @cached_property
    def _parts(self) -> dict[int, tuple[Part, ...]]:
        return {}

    def part(self, rank: int) -> tuple[Part, ...]:
        """The rounds that device `rank` takes part in, with one empty part for any number of rounds it sits out."""
        if rank not in self._parts:
            self._parts[rank] = self._part(rank)
        return self._parts[rank]

    def _part(self, rank: int) -> tuple[Part, ...]:
        mine = self.hops[(self.hops[:, 4] == rank) | (self.hops[:, 5] == rank)]
        rounds: dict[int, tuple[list[Hop], list[Hop]]] = {}
        for number, *numbers in mine.tolist():
            hop = Hop.of(numbers)
            sends, receives = rounds.setdefault(number, ([], []))
            (sends if hop.src == rank else receives).append(hop)
        parts: list[Part] = []
        before = None
        for number, (sends, receives) in rounds.items():
            if before is not None and number > before + 1:
                parts.append(Part((), ()))  # receives start a round ahead; after a pause not before it
            parts.append(Part(tuple(sends), tuple(receives)))
            before = number
        return tuple(parts)


@lru_cache(maxsize=1024)
def gather_route(src: Placement, dst: Placement, topology: Topology, links: Links, chunk_bytes: int) -> Route:
    """Route of SparseAllGather (paper, section 3.1).

    Args:
        src: exactly one device per expert.
        dst: any placement of the same shape.
        topology: which devices share a node.
        links: between the devices.
        chunk_bytes: size of one expert.
    """
    return _route("gather", dst, src, topology, links, chunk_bytes, chunk_bytes)


@lru_cache(maxsize=1024)
def reduce_route(
    src: Placement, dst: Placement, topology: Topology, links: Links, chunk_bytes: int, partial_bytes: int
) -> Route:
    """Route of SparseReduceScatter (paper, section 3.1).

    Args:
        src: who contributes.
        dst: exactly one device per expert.
        topology: which devices share a node.
        links: between the devices.
        chunk_bytes: size of one contribution.
        partial_bytes: size of a partial sum, in accumulation dtype.
    """
    return _route("reduce", src, dst, topology, links, chunk_bytes, partial_bytes)


def _route(
    kind: str, holds: Placement, owns: Placement, topology: Topology, links: Links, chunk: int, partial: int
) -> Route:
    if holds.matrix.shape != owns.matrix.shape or holds.num_devices != topology.num_devices:
        raise ValueError(
            f"route: placements {holds.matrix.shape} and {owns.matrix.shape} must both be [num_experts, num_devices] "
            f"with the topology's num_devices={topology.num_devices}"
        )
    numbers = np.array([getattr(links, f.name) for f in fields(Links)], dtype=np.int64)
    hops, shape, *times = find_route(
        kind, holds.matrix, owns.owners, topology.devices_per_node, chunk, partial, numbers
    )
    hops.setflags(write=False)
    return Route(hops, shape, *times)
