"""Counts torch allocations of the routed transport: gathers need none, reductions a bounded amount."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.collectives_rank import placements
from hecate.collectives.moves import moves_between
from hecate.collectives.on_host import RoutedOnHost
from hecate.collectives.queue import HostQueue
from hecate.collectives.route import Hop, Links, Part, gather_route, reduce_route
from hecate.collectives.routed import ReductionState, Routed
from hecate.collectives.staging import Staging
from hecate.collectives.summation import accumulation_dtype
from hecate.placement import Placement, Topology
from tests.collectives.cases import FINE, settings_of
from tests.collectives.on_cpu import Recorder, Rounds
from tests.collectives.reference import Case
from tests.workers import Groups

TOPOLOGY = Topology(4, 2)
CLUSTER = Links(600_000_000, 900_000_000, 48_000_000, 48_000_000, 200_000, 400_000)
"""Links about as `benchmarks.collectives` measures them on its emulated cluster."""
SIZES = (1 << 15, 50_001, 1 << 17)  # elements of a chunk; pieces have at least 64 KiB
KINDS = (RoutedOnHost, Rounds)


class Allocations(TorchDispatchMode):
    """Records storages that operations of this thread allocate and that are not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[StorageWeakRef, int] = {}
        self.made = self.peak = self.peak_bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                self._see(StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes(), before)
        return result

    def alive(self) -> list[int]:
        """Bytes of each."""
        self._bytes = {s: n for s, n in self._bytes.items() if not s.expired()}
        return list(self._bytes.values())

    def _see(self, storage: StorageWeakRef, num_bytes: int, before: set[StorageWeakRef]) -> None:
        if storage not in before and storage not in self._bytes:
            self._bytes[storage] = num_bytes
            self.made += 1
            self.largest = max(self.largest, num_bytes)
            self.peak = max(self.peak, len(self.alive()))
            self.peak_bytes = max(self.peak_bytes, sum(self.alive()))


class Inline(Executor):
    """An executor that runs tasks immediately in this thread, where `Allocations` records them."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        done: Future = Future()
        done.set_result(function(*args, **kwargs))
        return done


def transport_of(kind: type[Routed]) -> Routed:
    queue = {"queue": HostQueue(Inline())} if kind is RoutedOnHost else {}
    return kind(dist.group.WORLD, TOPOLOGY, FINE, **queue)


def gather(transport: Routed, case: Case, numel: int, seen: Allocations) -> int:
    """Hops that this rank relays."""
    rank = dist.get_rank()
    sent = {e: torch.full((numel,), float(e)) for e in case.src.held_by(rank).tolist()}
    received = {e: torch.empty(numel) for e in (case.dst - case.src).held_by(rank).tolist()}
    with seen:
        transport.gather(moves_between(case.src, case.dst), sent, received).wait()
    assert all(bool((row == e).all()) for e, row in received.items())
    route = gather_route(case.src, case.dst, TOPOLOGY, FINE, 4 * numel)
    return sum(hop.expert in received for part in route.part(rank) for hop in part.sends)


def gather_some(kind: type[Routed]) -> int:
    transport, seen = transport_of(kind), Allocations()
    handed_on = [gather(transport, Case.random(4, 2, seed), numel, seen) for seed in range(8) for numel in SIZES]
    assert seen.made == 0
    return sum(handed_on)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gather_stages_nothing(groups: Groups, kind: type[Routed]) -> None:
    assert max(groups(4).run(gather_some, kind)) > 0


def reduce(transport: Routed, case: Case, numel: int, wire: torch.dtype, seen: Allocations) -> None:
    rank, wide = dist.get_rank(), accumulation_dtype(wire)
    contributed = {e: torch.ones(numel, dtype=wire) for e in case.dst.held_by(rank).tolist()}
    sums = {e: torch.empty(numel, dtype=wide) for e in case.src.held_by(rank).tolist()}
    moves = moves_between(case.src, case.dst).reversed
    with seen:
        transport.reduce(moves, contributed, sums, wire).wait()
    assert all(bool((row == len(case.dst.holders_of(e))).all()) for e, row in sums.items())


class Staged:
    """Pieces, by peer, that were or are being received and are not added yet."""

    def __init__(self) -> None:
        self._now: Counter[int] = Counter()
        self.most = 0

    @contextmanager
    def counted(self):  # type: ignore[no-untyped-def]
        stage, add = ReductionState.stage, ReductionState.add

        def staged(state: ReductionState, hop: Hop) -> Tensor:
            self._now[hop.src] += 1
            self.most = max(self.most, self._now[hop.src])
            return stage(state, hop)

        def added(state: ReductionState, hop: Hop, piece: Tensor) -> None:
            self._now[hop.src] -= 1
            add(state, hop, piece)

        with mock.patch.multiple(ReductionState, stage=staged, add=added):
            yield


def sums_under_way(parts: tuple[Part, ...]) -> int:
    """The largest number of sums that a rank has open at once. A sum is open from the round that brings its first
    contribution until the round after the one that carries it away, or in which the owner's result is complete.
    """
    first: dict[tuple[int, int, bool], int] = {}
    last: dict[tuple[int, int, bool], int] = {}
    for i, part in enumerate(parts):
        for hop in part.receives:
            key = (hop.expert, hop.piece, hop.final)
            first.setdefault(key, i)
            last[key] = i
        for hop in part.sends:
            if hop.partial:
                last[hop.expert, hop.piece, False] = i + 1
    open_in: dict[int, int] = defaultdict(int)
    for key in first:
        for i in range(first[key], last[key] + 1):
            open_in[i] += 1
    return max(open_in.values(), default=0)


def check_reductions(kind: type[Routed], wire: torch.dtype) -> int:
    """Every call on a new transport; the most pieces of a peer that were staged."""
    rank, wide, staged = dist.get_rank(), accumulation_dtype(wire), Staged()
    for seed in range(8):
        for numel in SIZES:
            case, seen = Case.random(4, 2, seed), Allocations()
            with staged.counted():
                reduce(transport_of(kind), case, numel, wire, seen)
            route = reduce_route(case.dst, case.src, TOPOLOGY, FINE, numel * wire.itemsize, numel * wide.itemsize)
            parts = route.part(rank)
            received = [hop for part in parts for hop in part.receives]
            # A piece in accumulation dtype; a sum is of the nodes before and of the present one.
            piece = max((-(-numel // hop.pieces) for hop in received), default=0) * wide.itemsize
            peers = len({hop.src for hop in received})
            assert seen.peak_bytes <= (2 * peers + 2 * sums_under_way(parts)) * piece, f"seed {seed}, {numel}"
            assert not seen.alive()
    return staged.most


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reduction_stages_two_pieces_a_peer(groups: Groups, kind: type[Routed], wire: torch.dtype) -> None:
    most = max(groups(4).run(check_reductions, kind, wire))
    assert most == (2 if kind is RoutedOnHost else 1)


class Taken(Staging):
    """Counts bytes that are taken and not given back."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.now += numel * dtype.itemsize
        self.peak = max(self.peak, self.now)
        return super().take(numel, dtype, device)

    def give(self, piece: Tensor) -> None:
        self.now -= piece.numel() * piece.itemsize
        super().give(piece)


def check_staging(owners: Placement, holders: Placement, topology: Topology, links: Links, numel: int) -> None:
    """What a reduction stages on every rank, unfinished sums included, is at most two pieces per peer.

    Pieces are counted in accumulation dtype; peers are ranks that send pieces or receive sums. If contributions are
    narrower than sums, one sum and one result may need five pieces.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    for wire, result in ((fp32, fp32), (bf16, fp32), (bf16, bf16)):
        wide = accumulation_dtype(wire)
        route = reduce_route(holders, owners, topology, links, numel * wire.itemsize, numel * wide.itemsize)
        for rank in range(topology.num_devices):
            parts, staging = route.part(rank), Taken()
            held = {e: torch.empty(numel, dtype=wire, device="meta") for e in holders.held_by(rank).tolist()}
            sums = {e: torch.empty(numel, dtype=result, device="meta") for e in owners.held_by(rank).tolist()}
            state = ReductionState(rank, topology, parts, held, sums, wire, staging)
            Recorder(rank, topology)._run_reduction(parts, state, ahead=1)
            hops = [h for part in parts for h in (*part.receives, *part.sends)]
            peers = {h.src for h in hops} | {h.dst for h in hops if h.partial}
            piece = max((-(-numel // h.pieces) for h in hops), default=0) * wide.itemsize
            assert staging.now == 0
            pieces = max(2 * len(peers - {rank}), 0 if wire == wide else 5)
            assert staging.peak <= pieces * piece, f"rank {rank}, {wire}, {result}"


@pytest.mark.parametrize("mib", [0.25, 1, 4, 16])
def test_two_pieces_a_peer_in_the_benchmark(mib: float) -> None:
    topology = Topology(8, 4)
    for _, src, dst in placements(topology):
        check_staging(src, dst, topology, CLUSTER, int(mib * 2**18))


@settings(max_examples=150, deadline=None)
@given(settings_of())
def test_two_pieces_a_peer(setting: tuple[Placement, Placement, Topology, Links, int]) -> None:
    owners, holders, topology, links, chunk = setting
    check_staging(owners, holders, topology, links, chunk // 4)


def check_changing_placements(kind: type[Routed]) -> list[int]:
    """Allocations of each pass over placements, chunk sizes and dtypes that change from call to call."""
    calls = [
        (Case.random(4, 2, seed), SIZES[seed % len(SIZES)], wire)
        for seed in range(16)
        for wire in (torch.float32, torch.bfloat16)
    ]
    buffers = largest = 0
    for call in calls:
        alone = Allocations()
        reduce(transport_of(kind), *call, alone)
        buffers, largest = max(buffers, alone.peak), max(largest, alone.largest)
    transport, seen, made = transport_of(kind), Allocations(), []
    for _ in range(8):
        before = seen.made
        for call in calls:
            reduce(transport, *call, seen)
        made.append(seen.made - before)
        assert len(seen.alive()) <= buffers, "more buffers than any of the calls needs by itself"
        assert max(seen.alive()) <= largest
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_changing_placements_share_memory(groups: Groups, kind: type[Routed]) -> None:
    for made in groups(4).run(check_changing_placements, kind):
        assert made[0] > 0
        assert made[-1] == 0  # buffers only grow, so in the end no more are needed
