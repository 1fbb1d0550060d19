"""The routed transport gives the same bits as the plain one, whatever route the links lead to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.point_to_point import PointToPoint
from hecate.collectives.groups import transport_of
from hecate.collectives.route import Links, gather_route, reduce_route
from hecate.collectives.summation import accumulation_dtype
from hecate.placement import Placement, Topology
from hecate.private_torch import default_store
from tests.collectives.cases import CHUNK, FINE, PORTS, assert_same_bits, case_of, start_gather, start_reduce
from tests.collectives.reference import Case
from tests.workers import Groups


def compare(devices: int, per_node: int, links: Links, dtype: torch.dtype) -> int:
    """Number of hops that carry less than a chunk, to check that the test covers some."""
    topology = Topology(devices, per_node)
    plain = PointToPoint(dist.group.WORLD, topology)
    routed = transport_of(dist.group.WORLD, "cpu", topology, links)
    pieces = 0
    for seed in range(4):
        case = case_of(devices, per_node, seed)
        assert_same_bits(plain, routed, case, dtype, f"seed {seed}")
        size = int(np.prod(CHUNK)) * dtype.itemsize
        wide = int(np.prod(CHUNK)) * accumulation_dtype(dtype).itemsize
        gather = gather_route(case.src, case.dst, topology, links, size)
        reduce = reduce_route(case.dst, case.src, topology, links, size, wide)
        pieces += int((gather.hops[:, 3] > 1).sum() + (reduce.hops[:, 3] > 1).sum())
    return pieces


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("links", [FINE, PORTS])
@pytest.mark.parametrize(("devices", "per_node"), [(3, 3), (4, 2), (5, 1), (5, 5)])
def test_same_bits_as_plain_sends(
    groups: Groups, devices: int, per_node: int, links: Links, dtype: torch.dtype
) -> None:
    pieces = groups(devices).run(compare, devices, per_node, links, dtype)
    assert min(pieces) > 0


def overlap(devices: int, nodes_of: tuple[int, ...]) -> None:
    """Start every case and topology at once, and wait for them in reverse order."""
    calls = [
        (Topology(devices, per_node), case_of(devices, per_node, seed), start)
        for seed in range(4)
        for per_node in nodes_of
        for start in (start_gather, start_reduce)
    ]
    expected = []
    for topology, case, start in calls:
        out, work = start(PointToPoint(dist.group.WORLD, topology), case, torch.float32)
        work.wait()
        expected.append(out)
    routed = {topology: transport_of(dist.group.WORLD, "cpu", topology, FINE) for topology, _, _ in calls}
    got = [start(routed[topology], case, torch.float32) for topology, case, start in calls]
    for (out, work), right in zip(got[::-1], expected[::-1], strict=True):
        work.wait()
        assert torch.equal(out, right)


@pytest.mark.parametrize("nodes_of", [(2,), (1, 2, 4)])
def test_many_under_way_at_once(groups: Groups, nodes_of: tuple[int, ...]) -> None:
    groups(4).run(overlap, 4, nodes_of)


def hand_on_without_waiting() -> None:
    """Half of rank 2's copy is relayed by rank 1, which waits for its own result only after rank 2 has everything."""
    topology = Topology(3, 3)
    routed = transport_of(dist.group.WORLD, "cpu", topology, FINE)
    case = Case(Placement.from_owners([0], 3), Placement(np.ones((1, 3))), topology, CHUNK, 0)
    out, work = start_gather(routed, case, torch.float32)
    if dist.get_rank() == 1:
        default_store().wait(["rank 2 has its copy"])
    work.wait()
    if dist.get_rank() == 2:
        default_store().set("rank 2 has its copy", "yes")
    assert all(torch.equal(row, case.row(0, 0, torch.float32)) for row in out)


def test_pieces_are_handed_on_while_the_caller_computes(groups: Groups) -> None:
    groups(3).run(hand_on_without_waiting)
