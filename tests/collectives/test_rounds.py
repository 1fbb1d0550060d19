"""Tests the CUDA code path without CUDA: rounds over gloo, group calls in a simulation of NCCL, streams by a fake."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.point_to_point import PointToPoint
from hecate.collectives import on_host, on_stream
from hecate.collectives.route import Hop, Links, gather_route, reduce_route
from hecate.collectives.routed import ReductionState
from hecate.collectives.staging import Staging
from hecate.collectives.summation import accumulation_dtype
from hecate.placement import Placement, Topology
from tests.collectives.cases import FINE, LINKS, PORTS, case_of, settings_of, start_gather, start_reduce
from tests.collectives.on_cpu import Call, Recorder, Rounds
from tests.workers import Groups


class OneWork:
    """One work object for all operations of a batch, as NCCL returns it."""

    def __init__(self, works: list[dist.Work]) -> None:
        self.wait = lambda: [work.wait() for work in works]


def compare(devices: int, per_node: int, dtype: torch.dtype) -> int:
    """The number of batches, each with one work object."""
    topology, batch, batches = Topology(devices, per_node), dist.batch_isend_irecv, 0

    def coalesced(operations: list[dist.P2POp]) -> list[OneWork]:
        nonlocal batches
        batches += 1
        return [OneWork(batch(operations))]

    for links in (FINE, PORTS):
        plain, rounds = PointToPoint(dist.group.WORLD, topology), Rounds(dist.group.WORLD, topology, links)
        for seed in range(4):
            case = case_of(devices, per_node, seed)
            for start in (start_gather, start_reduce):
                expected, work = start(plain, case, dtype)
                work.wait()
                with mock.patch.object(on_stream.dist, "batch_isend_irecv", coalesced):
                    got, work = start(rounds, case, dtype)
                work.wait()
                assert torch.equal(got, expected), f"{start.__name__}, seed {seed}, {links}"
    return batches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("devices", "per_node"), [(1, 1), (2, 1), (3, 3), (4, 2), (5, 1), (5, 5)])
def test_same_bits_as_plain_sends(groups: Groups, devices: int, per_node: int, dtype: torch.dtype) -> None:
    batches = groups(devices).run(compare, devices, per_node, dtype)
    assert devices == 1 or max(batches) > 0


# Group calls: a rank's call ends when the other half of each of its messages is in a call that the peer has entered.


def group_calls(devices: int, per_node: int, seed: int) -> list[list[Call]]:
    """The group calls of every rank for a sequence of gathers and reductions between random placements."""
    topology, rng = Topology(devices, per_node), np.random.default_rng([devices, per_node, seed])
    recorders = [Recorder(rank, topology) for rank in range(devices)]
    for _ in range(3):
        experts = int(rng.integers(1, 12))
        owners = Placement.from_owners(rng.integers(0, devices, experts), devices)
        holders = Placement(rng.random((experts, devices)) < rng.choice([0.1, 0.5, 1.0], (experts, 1)))
        links, numel = LINKS[rng.integers(len(LINKS))], int(rng.choice([1000, 1 << 18]))
        gather = gather_route(owners, holders, topology, links, 4 * numel)
        reduce = reduce_route(holders, owners, topology, links, 4 * numel, 4 * numel)
        row = torch.zeros(1).expand(numel)
        for recorder in recorders:
            rank = recorder._rank
            held, owned = (dict.fromkeys(p.held_by(rank).tolist(), row) for p in (holders, owners))
            recorder._gather_in_rounds(gather.part(rank), held | owned)
            sums = {e: torch.zeros(numel) for e in owned}
            parts = reduce.part(rank)
            state = ReductionState(rank, topology, parts, held, sums, torch.float32, Staging())
            recorder._run_reduction(parts, state, ahead=0)
    return [recorder.calls for recorder in recorders]


def finished(ranks: list[list[Call]]) -> bool:
    """Whether all group calls end. Messages of a pair match in order; matched ones must be of the same hop."""
    place = [0] * len(ranks)
    sent: dict[tuple[int, int], deque[Hop]] = defaultdict(deque)
    received: dict[tuple[int, int], deque[Hop]] = defaultdict(deque)
    open_halves = [0] * len(ranks)

    def enter(rank: int) -> None:
        for mine, theirs, hops in zip((sent, received), (received, sent), ranks[rank][place[rank]], strict=True):
            for hop in hops:
                pair = (hop.src, hop.dst)
                if theirs[pair]:
                    assert theirs[pair].popleft() == hop, "a message is taken for another one"
                    open_halves[hop.src + hop.dst - rank] -= 1
                else:
                    mine[pair].append(hop)
                    open_halves[rank] += 1

    waiting = deque(rank for rank, calls in enumerate(ranks) if calls)
    for rank in waiting:
        enter(rank)
    while any(open_halves[rank] == 0 for rank in waiting):
        for rank in [r for r in waiting if open_halves[r] == 0]:
            place[rank] += 1
            if place[rank] == len(ranks[rank]):
                waiting.remove(rank)
            else:
                enter(rank)
    return not waiting


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(2, 1), (3, 3), (4, 2), (6, 2), (8, 4), (9, 3)]), st.integers(0, 10**6))
def test_group_calls_of_all_ranks_end(layout: tuple[int, int], seed: int) -> None:
    calls = group_calls(*layout, seed)
    assert finished(calls)


def test_group_calls_in_another_order_would_not_end() -> None:
    there, back = Hop(0, 0, 1, 0, 1, 0, False, True, True), Hop(1, 0, 1, 1, 0, 1, False, True, True)
    one: list[Call] = [([there], []), ([], [back])]
    other: list[Call] = [([], [there]), ([back], [])]
    assert finished([one, other])
    assert not finished([one, other[::-1]])


# Messages: those of one sender, receiver and tag match in the order they are started in.


@settings(max_examples=150, deadline=None)
@given(settings_of(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_messages_of_a_tag_are_received_in_the_order_they_are_sent_in(
    setting: tuple[Placement, Placement, Topology, Links, int], wire: torch.dtype, narrow: bool
) -> None:
    owners, holders, topology, links, chunk = setting
    numel, wide = chunk // wire.itemsize, accumulation_dtype(wire)
    route = reduce_route(holders, owners, topology, links, numel * wire.itemsize, numel * wide.itemsize)
    sent: dict[tuple, list[Hop]] = defaultdict(list)
    received: dict[tuple, list[Hop]] = defaultdict(list)
    for rank in range(topology.num_devices):
        recorder, parts = Recorder(rank, topology), route.part(rank)
        held = {e: torch.empty(numel, dtype=wire, device="meta") for e in holders.held_by(rank).tolist()}
        result = wire if narrow else wide
        sums = {e: torch.empty(numel, dtype=result, device="meta") for e in owners.held_by(rank).tolist()}
        recorder._run_reduction(parts, ReductionState(rank, topology, parts, held, sums, wire, Staging()), ahead=1)
        for call in recorder.calls:
            for hops, messages in zip(call, (sent, received), strict=True):
                for hop in hops:
                    span, dtype = hop.range_of(numel), wide if hop.partial else wire
                    tag = on_host.tag_of(hop, (span.stop - span.start) * dtype.itemsize)
                    messages[hop.src, hop.dst, tag].append(hop)
    assert sent == received


# Streams: what waits for what, and how long rows are held.


class FakeStream:
    """Records the calls made on it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"{self.name}'s event"


class FakeCuda:
    """`torch.cuda` with a current stream that tests set."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = FakeStream("caller", self.log)

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802  # torch's name
        return FakeStream("side", self.log)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    fake = FakeCuda()
    with mock.patch.object(torch, "cuda", fake):
        yield fake


def test_rows_are_held_until_both_streams_are_behind(cuda: FakeCuda) -> None:
    transport, row, seen = Recorder(0, Topology(1, 1)), torch.zeros(4), []
    alive = weakref.ref(row)

    def run(row: Tensor = row) -> None:
        seen.append(cuda.current.name)

    work = transport._on_stream(run, row.device)
    del run, row
    gc.collect()
    assert alive() is not None
    cuda.current = FakeStream("other", cuda.log)
    work.wait()
    assert seen == ["side"]
    assert cuda.log[0] == "side waits for caller"
    assert sorted(cuda.log[1:]) == ["caller waits for side's event", "other waits for side's event"]
    gc.collect()
    assert alive() is None


def test_one_wait_where_the_caller_waits_itself(cuda: FakeCuda) -> None:
    transport = Recorder(0, Topology(1, 1))
    for _ in range(2):
        transport._on_stream(lambda: None, torch.device("cpu")).wait()
    assert cuda.log == ["side waits for caller", "caller waits for side's event"] * 2


def test_after_an_error_the_callers_stream_is_behind_what_was_started(cuda: FakeCuda) -> None:
    def run() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        Recorder(0, Topology(1, 1))._on_stream(run, torch.device("cpu"))
    assert cuda.log == ["side waits for caller", "caller waits for side"]
    assert cuda.current.name == "caller"
