"""Placements, links and rows that the tests of routes and of transports share."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from hecate.collectives.moves import moves_between
from hecate.collectives.route import Links
from hecate.collectives.summation import accumulation_dtype
from hecate.collectives.transport import Transport, Work
from hecate.placement import Placement, Topology
from tests.collectives.reference import Case

MIB = 1 << 20
SLOW_BORDER = Links(
    device=300_000_000, fabric=10**12, crossing=50_000_000, border=50_000_000, message_ns=100_000, relay_ns=50_000
)
NVLINK_PORTS = Links(
    device=300 * 10**9, fabric=10**13, crossing=45 * 10**9, border=360 * 10**9, message_ns=5_000, relay_ns=5_000
)
HOST = Links(device=10**9, fabric=10**9, crossing=10**9, border=10**9, message_ns=100_000, relay_ns=50_000)
LINKS = (SLOW_BORDER, NVLINK_PORTS, HOST)


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[Placement, Placement, Topology, Links, int]:
    """Owners, holders, topology, links, chunk bytes."""
    per_node, nodes = draw(st.sampled_from([(1, 1), (5, 1), (1, 4), (2, 2), (4, 2), (3, 3), (2, 5)]))
    topology = Topology(per_node * nodes, per_node)
    experts = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    owners = Placement.from_owners(rng.integers(0, topology.num_devices, experts), topology.num_devices)
    share = rng.choice([0.0, 0.1, 0.5, 1.0], (experts, 1))
    holders = rng.random((experts, topology.num_devices)) < share
    if draw(st.booleans()):
        holders |= owners.matrix
    chunk = draw(st.sampled_from([4, 4000, MIB, 16 * MIB]))
    return owners, Placement(holders), topology, draw(st.sampled_from(LINKS)), chunk


# Messages without a fixed cost, so that routes have as many pieces and relays as possible.
FINE = Links(device=10**7, fabric=10**12, crossing=10**7, border=10**7, message_ns=0, relay_ns=0)
PORTS = Links(device=10**7, fabric=10**12, crossing=10**7, border=10**8, message_ns=0, relay_ns=0)
CHUNK = (8, 12345)


def case_of(devices: int, per_node: int, seed: int) -> Case:
    small = Case.random(devices, per_node, seed)
    return Case(small.src, small.dst, small.topology, CHUNK, seed)


def rows_of(rows: Tensor, placement: Placement) -> dict[int, Tensor]:
    held = placement.held_by(dist.get_rank()).tolist()
    return dict(zip(held, rows.flatten(1).unbind(0), strict=True)) if held else {}


def start_gather(transport: Transport, case: Case, dtype: torch.dtype) -> tuple[Tensor, Work]:
    rank = dist.get_rank()
    shard = case.rows(case.src, rank, dtype)
    new = case.dst - case.src
    out = torch.empty(len(new.held_by(rank)), *CHUNK, dtype=dtype)
    return out, transport.gather(moves_between(case.src, case.dst), rows_of(shard, case.src), rows_of(out, new))


def start_reduce(transport: Transport, case: Case, dtype: torch.dtype) -> tuple[Tensor, Work]:
    rank = dist.get_rank()
    grads = case.rows(case.dst, rank, dtype)
    out = torch.empty(len(case.src.held_by(rank)), *CHUNK, dtype=accumulation_dtype(dtype))
    moves = moves_between(case.src, case.dst).reversed
    return out, transport.reduce(moves, rows_of(grads, case.dst), rows_of(out, case.src), dtype)


def assert_same_bits(first: Transport, second: Transport, case: Case, dtype: torch.dtype, words: str) -> None:
    """That both give the same for a gather and a reduction."""
    for start in (start_gather, start_reduce):
        results = []
        for transport in (first, second):
            out, work = start(transport, case, dtype)
            work.wait()
            results.append(out)
        assert torch.equal(*results), f"{start.__name__}, {words}"
