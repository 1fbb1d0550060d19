"""If a rank is killed during collectives, all others raise an error within the group's timeout."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from benchmarks.point_to_point import PointToPoint
from hecate.collectives.groups import transport_of
from hecate.collectives.moves import moves_between
from hecate.collectives.on_host import RoutedOnHost
from hecate.collectives.queue import HostQueue
from hecate.collectives.transport import Rows, Transport, Work
from hecate.placement import Placement, Topology
from tests.collectives.cases import FINE
from tests.workers import Groups, start_scripts

TIMEOUT = timedelta(seconds=10)
SLACK = 90.0  # seconds until a busy machine has let everybody run
LARGE = 4 << 20  # elements of a chunk: more than sockets hold, so that they are on their way for a while
SMALL = 20_000
VICTIM = 1


def make(kind: type[Transport]) -> Transport:
    """Use a separate group, so that its timeout applies to collectives and not to starting the processes."""
    world = dist.get_world_size()
    group = dist.new_group(timeout=TIMEOUT)
    topology = Topology(world, 2 if world == 4 else world)
    return transport_of(group, "cpu", topology, FINE) if kind is RoutedOnHost else kind(group, topology)


def start_gather(transport: Transport, numel: int) -> Work:
    """Gather one expert per rank to all ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    moves = moves_between(Placement.even(world, world), Placement([[True] * world] * world))
    sent: Rows = {rank: torch.zeros(numel)}
    return transport.gather(moves, sent, {e: torch.zeros(numel) for e in range(world) if e != rank})


def start_reduce(transport: Transport, numel: int) -> Work:
    """The reverse reduction."""
    world, rank = dist.get_world_size(), dist.get_rank()
    moves = moves_between(Placement.even(world, world), Placement([[True] * world] * world)).reversed
    contributed: Rows = {e: torch.zeros(numel) for e in range(world)}
    return transport.reduce(moves, contributed, {rank: torch.zeros(numel)}, torch.float32)


def survive(kind: type[Transport], collectives: Callable[[Transport], None]) -> str:
    """The errors that a surviving rank's collectives raised."""
    transport = make(kind)
    start_gather(transport, SMALL).wait()  # all are connected
    dist.barrier()
    try:
        collectives(transport)
    except RuntimeError as error:
        return str(error)
    return "no error"


def large_ones(transport: Transport) -> None:
    """The killed rank dies in the first collective and does not start the others."""
    works = [start_gather(transport, LARGE)]
    if dist.get_rank() == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    works += [start(transport, LARGE) for start in (start_reduce, start_gather)]
    for work in works:
        work.wait()


def many_small_ones(transport: Transport) -> None:
    """The killed rank dies after a fixed time, in the middle of any of the collectives."""
    if dist.get_rank() == VICTIM:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        for start in (start_gather, start_reduce):
            start(transport, SMALL).wait()


@pytest.mark.parametrize("collectives", [large_ones, many_small_ones])
@pytest.mark.parametrize(("kind", "world"), [(RoutedOnHost, 4), (PointToPoint, 3)])
def test_a_killed_rank_is_an_error_on_every_survivor(
    kind: type[Transport], world: int, collectives: Callable[[Transport], None]
) -> None:
    ranks, pipes = start_scripts(world)
    try:
        for pipe in pipes:
            pipe.send((survive, (kind, collectives)))
        assert ranks[VICTIM].wait(SLACK) == -signal.SIGKILL
        deadline = time.monotonic() + TIMEOUT.total_seconds() + SLACK
        survivors = [rank for rank in range(world) if rank != VICTIM]
        for rank in survivors:
            assert pipes[rank].poll(deadline - time.monotonic()), f"rank {rank} has no error yet"
            worked, answer = pipes[rank].recv()
            assert worked, answer
            assert answer != "no error"
            pipes[rank].send(None)
        for rank in survivors:
            assert ranks[rank].wait(SLACK) == 0, f"rank {rank} does not end by itself"
    finally:
        for process in ranks:
            process.kill()


def test_what_is_queued_behind_a_failure_fails_with_it(groups: Groups) -> None:
    groups(1).run(queue_behind_a_failure)


def queue_behind_a_failure() -> None:
    queue, go, ran = HostQueue(), threading.Event(), []

    def fail() -> None:
        go.wait()
        raise RuntimeError("rank 7 is gone")

    works = [queue.start(run) for run in (fail, lambda: ran.append(1))]
    go.set()
    for work in works:
        with pytest.raises(RuntimeError, match="rank 7 is gone"):
            work.wait()
    assert not ran
