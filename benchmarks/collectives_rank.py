"""What one rank of `benchmarks.collectives` does: measure the links, then every way to move the same experts.

Shapes: E experts, D ranks, chunks of equal size. All are float32, so that sums are as wide as contributions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from benchmarks.point_to_point import PointToPoint
from benchmarks.report import Report
from hecate.collectives.groups import transport_of
from hecate.collectives.moves import moves_between
from hecate.collectives.route import Links, Route, gather_route, reduce_route
from hecate.collectives.transport import Transport
from hecate.loads.synthetic import synthetic_loads
from hecate.placement import Placement, Topology

__all__ = ["BOUND", "BROADCAST", "DENSE", "OURS", "PLAIN", "PREDICTED", "measure", "measure_links", "timed"]

MIB = 1 << 20
EXPERTS = 64
OURS, PLAIN, BROADCAST, DENSE = "ours", "point-to-point", "broadcast per expert", "dense (FSDP)"
BOUND, PREDICTED = "lower bound", "predicted"
DENSE_MOST = 4.0  # MiB; with larger chunks, a dense layer for this many ranks does not fit in one machine's memory


def measure(
    report: Report, where: str, topology: Topology, links: Links, best: Links, chunks: list[float], repeats: int
) -> None:
    """Every collective, placement kind and chunk size (MiB) on the running process group. Collective.

    Args:
        report: rows are added to it.
        where: the network's name in the report.
        topology: which ranks share a node.
        links: the links that routes are made for.
        best: the fastest links measured, for the lower bound.
        chunks: chunk sizes in MiB.
        repeats: repeats per measurement.
    """
    for name in ("device", "fabric", "crossing", "border"):
        for subject, of in (("typical", links), ("best", best)):
            report.add(where, subject, f"{name} goodput", getattr(of, name) / 1e6, "MB/s")
    for name in ("message", "relay"):
        report.add(where, "typical", name, getattr(links, f"{name}_ns") / 1e3, "us")
    subgroups = Subgroups()
    for chunk in chunks:
        dense = dense_seconds(int(chunk * MIB), topology, repeats) if chunk <= DENSE_MOST else {}
        for kind, src, dst in placements(topology):
            case = Case(src, dst, int(chunk * MIB) // 4, topology, links, best, subgroups)
            for collective in ("spAG", "spRS"):
                setting = f"{where}, {collective}, {kind}, {chunk:g} MiB"
                for subject, seconds in (case.seconds(collective, repeats) | dense.get(collective, {})).items():
                    report.add(setting, subject, "time", seconds, "s")


# The links.


def measure_links(topology: Topology) -> tuple[Links, Links]:
    """Typical links, for which routes are made, and the best measured ones, for the lower bound."""
    per_node, world = topology.devices_per_node, topology.num_devices
    ring = {d: d - d % per_node + (d + 1) % per_node for d in range(world)}
    others = range(1, per_node)
    out, into = goodput([(0, d) for d in others]), goodput([(d, 0) for d in others])
    inside = [rate // topology.num_nodes for rate in goodput(list(ring.items()))]
    one, together = out, [rate * per_node for rate in out]
    if topology.num_nodes > 1:
        one, together = goodput([(0, per_node)]), goodput([(d, d + per_node) for d in range(per_node)])
    fixed = message_ns(ring, per_node), relay_ns(per_node)

    def links(pick: Callable[[list[int]], float]) -> Links:
        device, crossing = int(min(pick(out), pick(into))), int(pick(one))
        return Links(device, max(device, int(pick(inside))), crossing, max(crossing, int(pick(together))), *fixed)

    return links(statistics.median), links(max)


def goodput(sends: list[tuple[int, int]], num_bytes: int = 8 * MIB, tries: int = 9) -> list[int]:
    """Total bytes per second of all `sends` (from, to) running together, one figure per repeat."""
    rank = dist.get_rank()
    out = torch.zeros(num_bytes, dtype=torch.uint8)
    into = {src: torch.zeros_like(out) for src, dst in sends if dst == rank}

    def exchange() -> None:
        works = [dist.isend(out, dst) for src, dst in sends if src == rank]
        works += [dist.irecv(memory, src) for src, memory in into.items()]
        for work in works:
            _wait(work)

    return [int(len(sends) * num_bytes / timed(exchange)) for _ in range(tries)]


def _wait(work: dist.Work | None) -> None:
    assert work is not None  # this rank is in the group
    work.wait()


def message_ns(ring: dict[int, int], per_node: int, times: int = 50) -> int:
    """The cost of one small message if all ranks of a node send and receive, one message at a time."""
    rank, payload = dist.get_rank(), torch.zeros(1024, dtype=torch.uint8)
    before = next(src for src, dst in ring.items() if dst == rank)

    def exchange() -> None:
        for _ in range(times):
            work = dist.isend(payload, ring[rank])
            dist.recv(payload, before)
            _wait(work)

    return int(min(timed(exchange) for _ in range(3)) * 1e9 / times / per_node)


def relay_ns(per_node: int, times: int = 20) -> int:
    """The time of one small message per hop, if the ranks of the first node pass it on one after the other."""
    rank, payload = dist.get_rank(), torch.zeros(1024, dtype=torch.uint8)

    def exchange() -> None:
        for _ in range(times if rank < per_node else 0):
            if rank > 0:
                dist.recv(payload, rank - 1)
            _wait(dist.isend(payload, (rank + 1) % per_node))
            if rank == 0:
                dist.recv(payload, per_node - 1)

    return int(min(timed(exchange) for _ in range(3)) * 1e9 / times / per_node)


def timed(run: Callable[[], object]) -> float:
    """Seconds from a common start until the last rank is finished. Collective."""
    dist.barrier()
    start = time.perf_counter()
    run()
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


# What is moved.


def placements(topology: Topology) -> Iterator[tuple[str, Placement, Placement]]:
    """Placement kinds: name, owners, and the holders to reach."""
    devices = topology.num_devices
    src = Placement.even(EXPERTS, devices)
    counts = synthetic_loads("zipf", devices, EXPERTS, 1024, 2, seed=0)[0]
    hottest = np.argsort(-counts.sum(axis=0), kind="stable")
    for name, hot in (("one expert to all", hottest[:1]), ("4 hottest to all", hottest[:4])):
        matrix = src.matrix.copy()
        matrix[hot] = True
        yield name, src, Placement(matrix)
    plan = hecate.plan(counts, src.owners, topology, memory_slots=2, max_imbalance=1.02, history=counts[None])
    yield "2 slots spread", src, plan.placement
    rng = np.random.default_rng(0)
    yield "random", src, Placement(src.matrix | (rng.random(src.matrix.shape) < 1 / devices))
    yield "re-shard permutation", src, Placement.from_owners(rng.permutation(src.owners), devices)


class Subgroups:
    """Process groups by set of ranks, each made only once. Collective."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def of(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The group of `ranks`, ascending."""
        if ranks not in self._groups:
            self._groups[ranks] = dist.new_group(list(ranks))
        return self._groups[ranks]


@dataclass
class Case:
    """Measures every subject on one pair of placements and one chunk size."""

    src: Placement
    dst: Placement
    numel: int
    topology: Topology
    links: Links
    best: Links
    subgroups: Subgroups

    def __post_init__(self) -> None:
        rank, group = dist.get_rank(), dist.group.WORLD
        assert group is not None
        self.ours = transport_of(group, "cpu", self.topology, self.links)
        self.plain = PointToPoint(group, self.topology)
        generator = torch.Generator().manual_seed(rank)
        owners, new = self.src.owners, (self.dst - self.src).matrix
        # As in training, experts that stay where they are are not included.
        moved = new.any(axis=1)
        holds, owns = (np.flatnonzero(p.matrix[:, rank] & moved).tolist() for p in (self.dst, self.src))
        self.shard = {e: torch.randn(self.numel, generator=generator) for e in owns}
        self.copies = {e: torch.zeros(self.numel) for e in np.flatnonzero(new[:, rank]).tolist()}
        self.grads = {e: torch.randn(self.numel, generator=generator) for e in holds}
        self.sums = {e: torch.zeros(self.numel) for e in owns}
        self.teams = {
            e: (int(owners[e]), tuple(sorted({int(owners[e]), *np.flatnonzero(new[e]).tolist()})))
            for e in np.flatnonzero(new.any(axis=1)).tolist()
        }
        for _, ranks in self.teams.values():
            self.subgroups.of(ranks)

    def seconds(self, collective: str, repeats: int) -> dict[str, float]:
        """Report the median time per subject, measured in turn, and the route's prediction."""
        gather = collective == "spAG"
        move, results = (self.gather, self.copies) if gather else (self.reduce, self.sums)
        broadcast = self.broadcasts if gather else self.reductions
        self.check_same_bits(move, results)
        ways = {OURS: lambda: move(self.ours), PLAIN: lambda: move(self.plain), BROADCAST: broadcast}
        broadcast()
        times: dict[str, list[float]] = {subject: [] for subject in ways}
        for _ in range(repeats):
            for subject, way in ways.items():
                times[subject].append(timed(way))
        routes = [self.route(gather, links) for links in (self.links, self.best)]
        stated = {PREDICTED: routes[0].predicted_ns / 1e9, BOUND: routes[1].bound_ns / 1e9}
        return {subject: statistics.median(values) for subject, values in times.items()} | stated

    def route(self, gather: bool, links: Links) -> Route:
        size = 4 * self.numel
        if gather:
            return gather_route(self.src, self.dst, self.topology, links, size)
        return reduce_route(self.dst, self.src, self.topology, links, size, size)

    def check_same_bits(self, move: Callable[[Transport], None], results: dict[int, Tensor]) -> None:
        move(self.plain)
        plain = {e: row.clone() for e, row in results.items()}
        for row in results.values():
            row.fill_(float("nan"))
        move(self.ours)
        if not all(torch.equal(row, plain[e]) for e, row in results.items()):
            raise RuntimeError(f"rank {dist.get_rank()}: the routed transport gave other bits than the plain one")

    def gather(self, transport: Transport) -> None:
        transport.gather(moves_between(self.src, self.dst), self.shard, self.copies).wait()

    def reduce(self, transport: Transport) -> None:
        moves = moves_between(self.src, self.dst).reversed
        transport.reduce(moves, self.grads, self.sums, torch.float32).wait()

    def broadcasts(self) -> None:
        """As in the paper: one broadcast per expert among its holders, all started together."""
        rank, works = dist.get_rank(), []
        for e, (owner, ranks) in self.teams.items():
            if rank in ranks:
                row = self.shard[e] if rank == owner else self.copies[e]
                works.append(dist.broadcast(row, owner, group=self.subgroups.of(ranks), async_op=True))
        for work in works:
            work.wait()

    def reductions(self) -> None:
        """As in the paper: one reduction per expert among its holders, all started together."""
        rank, works = dist.get_rank(), []
        for e, (owner, ranks) in self.teams.items():
            if rank in ranks:
                row = self.sums[e] if rank == owner else self.grads[e]
                works.append(dist.reduce(row, owner, group=self.subgroups.of(ranks), async_op=True))
        for work in works:
            work.wait()


def dense_seconds(chunk_bytes: int, topology: Topology, repeats: int) -> dict[str, dict[str, float]]:
    """All-gather and reduce-scatter of the whole layer, as FSDP does it."""
    layer = torch.zeros(EXPERTS, chunk_bytes // 4)
    shard = torch.zeros(EXPERTS // topology.num_devices, chunk_bytes // 4)
    repeats = min(repeats, 2)
    gather = [timed(lambda: dist.all_gather_into_tensor(layer, shard)) for _ in range(repeats)]
    reduce = [timed(lambda: dist.reduce_scatter_tensor(shard, layer)) for _ in range(repeats)]
    return {"spAG": {DENSE: min(gather)}, "spRS": {DENSE: min(reduce)}}
