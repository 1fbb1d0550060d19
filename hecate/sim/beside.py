"""What messages take from a rank's compute although they run beside it; for `hecate.sim.measure`.

On the CPU, compute, packing, the threads of gloo and the kernel's network stack share cores. While a rank computes, its
messages get little of them, so much of a transfer is left when compute ends, however long that was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.groups import release, transport_of
from hecate.collectives.moves import moves_between
from hecate.collectives.route import Links, Route, gather_route, reduce_route
from hecate.collectives.transport import Transport
from hecate.collectives.transport import Work as Running
from hecate.cost import CostModel
from hecate.placement import Placement, Topology
from hecate.ranks.agree import gather
from hecate.sim.clock import fit

__all__ = ["Work", "work_of_messages"]

OWNED = 2
"""Experts of each rank in the measured placements."""
LONGER = 1.5
"""Compute beside a transfer takes so many times as long as the transfer alone."""

Start = Callable[[], Running]


@dataclass(frozen=True)
class Work:
    """Compute that a rank loses to messages of Hecate's transport beside it.

    Attributes:
        message_ns: to each message sent or received.
        inside_ps, across_ps: to each byte inside a node and across nodes, picoseconds.
        points: what was measured.
    """

    message_ns: int
    inside_ps: int
    across_ps: int
    points: list[dict[str, Any]]


def work_of_messages(topology: Topology, width: int, size: int, repeats: int) -> Work:
    """By how much gathers and reductions of experts on the CPU delay compute beside them. Collective.

    Args:
        topology: of all ranks.
        width: of the matrices that are multiplied meanwhile.
        size: bytes of a large expert.
        repeats: of each measurement.
    """
    group = dist.new_group()
    links = Links.of(CostModel.cpu(), topology, "cpu")
    transport = transport_of(group, "cpu", topology, links)
    compute = _Compute(width)
    points: list[dict[str, Any]] = [
        {"rank": rank, "kind": kind, "bytes": numel * 4, **_counted(route, rank, numel, topology), "ns": ns}
        for numel in (size // 32, size // 4)
        for kind, route, start in _runs(transport, topology, links, numel)
        for rank, ns in enumerate(gather(compute.delay_ns(start, repeats)))
    ]
    release(group)
    dist.destroy_process_group(group)
    rows = [[p["across"], p["inside"], p["messages"]] for p in points]
    across, inside, message = fit(rows, [p["ns"] for p in points])
    return Work(int(message), int(1000 * inside), int(1000 * across), points)


class _Compute:
    """Matrix products that run beside a transfer."""

    def __init__(self, width: int) -> None:
        self._a = torch.randn(width, width)

    def delay_ns(self, start: Start, repeats: int) -> int:
        """How much longer products take on this rank if a transfer starts before them and is waited for after them.

        At least a tenth of the transfer's own time: less is lost in the noise of the two times.
        """
        transfer = self._time(start, 0, 3)
        once = self._time(_nothing, 16, 3) / 16
        number = max(gather(int(LONGER * transfer / once) + 1))
        alone, both = (self._time(each, number, repeats) for each in (_nothing, start))
        return int(max(both - alone, transfer / 10, 1))

    def _time(self, start: Start, number: int, repeats: int) -> float:
        """Median nanoseconds of a transfer with so many products beside it."""
        times = []
        for _ in range(repeats + 1):
            dist.barrier()
            begin = time.perf_counter_ns()
            running = start()
            for _ in range(number):
                self._a @ self._a
            running.wait()
            times.append(time.perf_counter_ns() - begin)
        return median(times[1:])


def _nothing() -> Running:
    return Running(lambda: None)


def _runs(transport: Transport, topology: Topology, links: Links, numel: int) -> Iterator[tuple[str, Route, Start]]:
    """Copies of one and of all experts of each rank, in the node and in the next one; then their gradients back."""
    devices, rank, per_node = topology.num_devices, dist.get_rank(), topology.devices_per_node
    owners = np.arange(OWNED * devices) // OWNED
    start = Placement.from_owners(owners, devices)
    beside = owners // per_node * per_node + (owners + 1) % per_node
    away = (owners + per_node) % devices
    first, every = np.arange(0, len(owners), OWNED), np.arange(len(owners))
    kinds = [("beside", first, beside), ("all beside", every, beside)] if per_node > 1 else []
    kinds += [("away", first, away), ("all away", every, away)] if topology.num_nodes > 1 else []
    for kind, experts, to in kinds:
        matrix = start.matrix.copy()
        matrix[experts, to[experts]] = True
        placement = Placement(matrix)
        moves, chunk = moves_between(start, placement), numel * 4
        shared = set(experts.tolist())
        sent = {e: row for e, row in _rows(start, rank, numel).items() if e in shared}
        arriving = _rows(placement - start, rank, numel)
        sums = {e: torch.empty_like(row) for e, row in sent.items()}
        held = {**sent, **arriving}
        there = gather_route(start, placement, topology, links, chunk)
        yield f"gather {kind}", there, lambda m=moves, s=sent, a=arriving: transport.gather(m, s, a)  # type: ignore[misc]
        home = reduce_route(placement, start, topology, links, chunk, chunk)
        back = moves.reversed
        yield f"reduce {kind}", home, lambda b=back, h=held, s=sums: transport.reduce(b, h, s, torch.float32)  # type: ignore[misc]


def _rows(placement: Placement, rank: int, numel: int) -> dict[int, Tensor]:
    return {int(e): torch.zeros(numel) for e in np.flatnonzero(placement.matrix[:, rank])}


def _counted(route: Route, rank: int, numel: int, topology: Topology) -> dict[str, int]:
    """Bytes of a rank inside its node and across, of what it sends and receives the larger; and its messages."""
    bytes_of = np.zeros((2, 2), dtype=np.int64)  # [received or sent, across or not]
    hops = [hop for part in route.part(rank) for hop in (*part.sends, *part.receives)]
    for hop in hops:
        span, across = hop.range_of(numel), topology.node_of(hop.src) != topology.node_of(hop.dst)
        bytes_of[int(hop.src == rank), int(across)] += 4 * (span.stop - span.start)
    inside, across_bytes = bytes_of.max(axis=0).tolist()
    return {"inside": inside, "across": across_bytes, "messages": len(hops)}
