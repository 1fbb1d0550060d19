"""The transport over shared memory gives the same bits as the others, between processes and along relays."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.point_to_point import PointToPoint
from hecate.collectives.moves import moves_between
from hecate.collectives.pulls import gathering
from hecate.collectives.route import Links
from hecate.collectives.symmetric import Symmetric
from hecate.collectives.transport import Into, Transport, Work
from hecate.ops.kernels.stack import KindRows
from hecate.placement import Placement, Topology
from tests.collectives.cases import CHUNK, FINE, PORTS, assert_same_bits, case_of, rows_of, start_gather, start_reduce
from tests.collectives.reference import Case
from tests.workers import Groups

CPU, MINUTE = torch.device("cpu"), timedelta(seconds=60)
NUMEL = int(np.prod(CHUNK))


def symmetric(topology: Topology, links: Links = FINE, timeout: timedelta = MINUTE) -> Symmetric:
    assert dist.group.WORLD is not None
    return Symmetric(dist.group.WORLD, topology, links, CPU, timeout)


def make_room(transport: Transport, case: Case, dtype: torch.dtype) -> None:
    moves = moves_between(case.src, case.dst)
    transport.room_to_gather(moves, NUMEL, dtype)
    transport.room_to_reduce(moves.reversed, NUMEL, dtype)


def compare(devices: int, per_node: int, dtype: torch.dtype) -> int:
    """The number of pieces that were handed on."""
    topology, relayed = Topology(devices, per_node), 0
    plain = PointToPoint(dist.group.WORLD, topology)
    for links in (FINE, PORTS):
        transport = symmetric(topology, links)
        for seed in range(4):
            case = case_of(devices, per_node, seed)
            make_room(transport, case, dtype)
            assert_same_bits(plain, transport, case, dtype, f"seed {seed}, {links}")
            pulls = gathering(case.src, case.dst, topology, links, NUMEL * dtype.itemsize).of(dist.get_rank())
            relayed += len(pulls.relayed)
        transport.close()
    return relayed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("devices", "per_node"), [(2, 2), (3, 3), (4, 4), (4, 2)])
def test_same_bits_as_plain_sends(groups: Groups, devices: int, per_node: int, dtype: torch.dtype) -> None:
    relayed = groups(devices).run(compare, devices, per_node, dtype)
    assert devices == 2 or sum(relayed) > 0


def many_at_once() -> None:
    """Start several collectives before the first is waited for: slots are used in turn, and memory grows in between."""
    topology = Topology(4, 4)
    plain, transport = PointToPoint(dist.group.WORLD, topology), symmetric(topology)
    started: list[tuple[Tensor, Work]] = []
    calls = [(case_of(4, 4, seed), start) for seed in range(6) for start in (start_gather, start_reduce)]
    for case, start in calls:
        make_room(transport, case, torch.float32)
        started.append(start(transport, case, torch.float32))
    for (case, start), (out, work) in zip(calls[::-1], started[::-1], strict=True):
        expected, wait = start(plain, case, torch.float32)
        wait.wait()
        work.wait()
        assert torch.equal(out, expected)
    transport.close()


def test_many_under_way_at_once(groups: Groups) -> None:
    groups(4).run(many_at_once)


def packed_in_place(dtype: torch.dtype) -> None:
    """Contributions written where others read them, again and again without a wait; sums added to rows of two kinds."""
    rank, topology = dist.get_rank(), Topology(3, 3)
    transport = symmetric(topology)
    src = Placement.from_owners([0, 1, 2, 0, 1, 2], 3)
    dst = Placement(src.matrix | (np.arange(18).reshape(6, 3) % 4 > 0))
    moves = moves_between(src, dst).reversed
    moving = sorted({t.expert for t in moves.transfers})
    split = 5000
    rows = {e: torch.zeros(NUMEL) for e in src.held_by(rank).tolist()}
    expected = {e: row.clone() for e, row in rows.items()}
    wide = torch.stack(list(rows.values()))
    kinds = [KindRows(wide[:, :split], 0), KindRows(wide[:, split:].contiguous(), split)]
    into = Into(kinds, {e: at for at, e in enumerate(rows) if e in moving}, scale=0.25)
    for seed in range(5):
        case = Case(src, dst, topology, (NUMEL,), seed)
        held = [e for e in moving if dst.matrix[e, rank]]
        room = transport.room_to_reduce(moves, NUMEL, dtype)
        assert room is not None
        assert room.shape == (len(held), NUMEL)
        for row, expert in zip(room, held, strict=True):
            row.copy_(case.row(expert, rank, dtype))
        work = transport.accumulate(moves, dict(zip(held, room, strict=True)), into, NUMEL, dtype)
        if seed == 4:
            work.wait()
        for e in into.row_of:
            total = torch.zeros(NUMEL)
            for r in dst.holders_of(e).tolist():
                total += case.row(e, r, dtype).float()
            expected[e] += 0.25 * total
    for e, at in into.row_of.items():
        got = torch.cat([kinds[0].rows[at], kinds[1].rows[at]])
        assert torch.equal(got, expected[e])
    transport.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contributions_are_read_where_they_were_packed_and_added_to_the_owners_rows(
    groups: Groups, dtype: torch.dtype
) -> None:
    groups(3).run(packed_in_place, dtype)


def one_rank_does_not_come() -> str:
    transport = symmetric(Topology(2, 2), timeout=timedelta(milliseconds=300))
    row = torch.ones(100)
    moves = moves_between(Placement.from_owners([0], 2), Placement([[True, True]]))
    message = ""
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError) as caught:
            transport.gather(moves, {}, {0: row}).wait()
        message = str(caught.value)
    dist.barrier()
    transport.close()
    return message


def test_a_rank_that_does_not_come_is_named(groups: Groups) -> None:
    _, message = groups(2).run(one_rank_does_not_come)
    assert message.startswith("Transport: rank 0 has not come to a collective over shared memory within 0.3 s")


def bad_input() -> None:
    transport = symmetric(Topology(2, 2))
    src = Placement.from_owners([0] * 4, 2)
    moves = moves_between(src, Placement(np.ones((4, 2))))
    rows = dict(enumerate(torch.zeros(4, 2**20)))
    given = (rows, {}) if dist.get_rank() == 0 else ({}, rows)
    with pytest.raises(RuntimeError, match=r"have no room for 4 rows of 4194304 bytes; all ranks must call room_to"):
        transport.gather(moves, *given)
    with pytest.raises(TypeError, match=r"wire=torch.int32; must be one of torch.float64, torch.float32"):
        transport.reduce(moves.reversed, {0: torch.zeros(4, dtype=torch.int32)}, {}, torch.int32)
    dist.barrier()
    transport.close()


def test_bad_input_is_named(groups: Groups) -> None:
    groups(2).run(bad_input)


def rows_of_nobody() -> None:
    """A rank that takes no part in some collectives stays in step with the others."""
    transport, rank = symmetric(Topology(3, 3)), dist.get_rank()
    for seed in range(4):
        src = Placement.from_owners([seed % 3, (seed + 1) % 3], 3)
        dst = Placement(src.matrix | [[False] * 3, [r == seed % 3 for r in range(3)]])
        case = Case(src, dst, Topology(3, 3), CHUNK, seed)
        make_room(transport, case, torch.float32)
        out, work = start_gather(transport, case, torch.float32)
        work.wait()
        new = (dst - src).held_by(rank).tolist()
        for e, row in zip(new, out, strict=True):
            assert torch.equal(row, case.row(e, int(src.owners[e]), torch.float32))
        assert rows_of(out, dst - src).keys() == set(new)
    transport.close()


def test_ranks_that_take_no_part(groups: Groups) -> None:
    groups(3).run(rows_of_nobody)
