"""Ranks of one process: nothing that a rank waits for is launched after its wait, and results are the right ones."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from benchmarks.virtual_ranks import VirtualRanks
from hecate.collectives.moves import moves_between
from hecate.collectives.route import Links
from hecate.collectives.transport import Into, Rows
from hecate.ops.kernels.stack import KindRows
from hecate.placement import Topology
from tests.collectives.cases import CHUNK, FINE, PORTS, case_of
from tests.collectives.reference import Case, gathered, reduced

NUMEL = CHUNK[0] * CHUNK[1]


def ranks_of(case: Case, links: Links, engine_bytes: int | None) -> VirtualRanks:
    room = case.src.num_experts * (8 * NUMEL + 16)
    return VirtualRanks(case.topology, links, torch.device("cpu"), room, engine_bytes, timeout=timedelta(0))


def held(case: Case, rank: int, dtype: torch.dtype, owned: bool) -> Rows:
    placement = case.src if owned else case.dst
    rows = case.rows(placement, rank, dtype).flatten(1)
    return dict(zip(placement.held_by(rank).tolist(), rows, strict=True))


@pytest.mark.parametrize("engine_bytes", [None, 1])
@pytest.mark.parametrize("links", [FINE, PORTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather(links: Links, dtype: torch.dtype, engine_bytes: int | None) -> None:
    for seed in range(4):
        case = case_of(4, 4, seed)
        ranks, new = ranks_of(case, links, engine_bytes), case.dst - case.src
        sent = [held(case, rank, dtype, owned=True) for rank in range(4)]
        received: list[Rows] = [
            {e: torch.empty(NUMEL, dtype=dtype) for e in new.held_by(rank).tolist()} for rank in range(4)
        ]
        for _ in range(3):  # slots are used again
            ranks.gather(moves_between(case.src, case.dst), sent, received)
        for rank in range(4):
            expected = dict(zip(case.dst.held_by(rank).tolist(), gathered(case, rank, dtype), strict=True))
            for e, row in received[rank].items():
                assert torch.equal(row, expected[e].flatten())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accumulate(dtype: torch.dtype) -> None:
    for seed in range(1, 4):
        case = case_of(4, 4, seed)
        ranks, moves = ranks_of(case, FINE, None), moves_between(case.src, case.dst).reversed
        moving = {t.expert for t in moves.transfers}
        contributed = [held(case, rank, dtype, owned=False) for rank in range(4)]
        owned = [case.src.held_by(rank).tolist() for rank in range(4)]
        sums = [torch.full((max(1, len(experts)), NUMEL), 9.0, dtype=dtype) for experts in owned]
        into = [
            Into([KindRows(rows, 0)], {e: at for at, e in enumerate(experts) if e in moving}, overwrite=True)
            for rows, experts in zip(sums, owned, strict=True)
        ]
        ranks.accumulate(moves, contributed, into, NUMEL, dtype)
        for rank, rows in enumerate(sums):
            for row, e, expected in zip(rows, owned[rank], reduced(case, rank, dtype), strict=False):
                assert torch.equal(row, expected.flatten() if e in moving else torch.full_like(row, 9.0))


def test_a_rank_that_does_not_signal_is_noticed() -> None:
    """What makes the two tests above fail if a step waits for something that comes later."""
    case = case_of(4, 4, 1)
    ranks = ranks_of(case, FINE, None)
    assert moves_between(case.src, case.dst).transfers
    for rank in ranks._ranks:
        rank._tell = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"rank \d has not come to a collective over shared memory within 0 s"):
        ranks.gather(
            moves_between(case.src, case.dst),
            [held(case, rank, torch.float32, owned=True) for rank in range(4)],
            [{e: torch.empty(NUMEL) for e in (case.dst - case.src).held_by(rank).tolist()} for rank in range(4)],
        )


def test_rows_without_room_are_refused() -> None:
    case = case_of(4, 4, 1)
    ranks = VirtualRanks(case.topology, FINE, torch.device("cpu"), 4096)
    with pytest.raises(ValueError, match=r"slot_bytes=4096 have no room for \d rows of 395040 bytes"):
        ranks.room(moves_between(case.src, case.dst).reversed, NUMEL, torch.float32)


def test_topology_of_nodes_decides_the_order_of_sums() -> None:
    """Two nodes of two ranks each: partial sums of the nodes are added."""
    case = case_of(4, 2, 1)
    assert case.topology == Topology(4, 2)
    ranks, moves = ranks_of(case, FINE, None), moves_between(case.src, case.dst).reversed
    moving = {t.expert for t in moves.transfers}
    owned = [case.src.held_by(rank).tolist() for rank in range(4)]
    sums = [torch.zeros(max(1, len(experts)), NUMEL) for experts in owned]
    into = [
        Into([KindRows(rows, 0)], {e: at for at, e in enumerate(experts) if e in moving})
        for rows, experts in zip(sums, owned, strict=True)
    ]
    ranks.accumulate(moves, [held(case, r, torch.float32, owned=False) for r in range(4)], into, NUMEL, torch.float32)
    for rank, rows in enumerate(sums):
        for row, e, expected in zip(rows, owned[rank], reduced(case, rank, torch.float32), strict=False):
            assert e not in moving or torch.equal(row, expected.flatten())
