"""If a rank dies, the others report which one."""

from __future__ import annotations

import os
import pickle
import signal
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hecate.errors import MissingRankError
from hecate.private_torch import default_store
from hecate.ranks import heartbeat
from hecate.ranks.heartbeat import PATIENCE, Heartbeat
from tests.forked import Program, free_port
from tests.workers import Group, Groups


def _wait_for_victim(victim: int, sign: signal.Signals) -> tuple[str, list[int]]:
    # The time that starting the processes takes is not limited, only that of this group's collectives.
    group = dist.new_group(timeout=timedelta(seconds=3))
    heart = Heartbeat(default_store(), dist.get_rank(), dist.get_world_size(), timedelta(seconds=0.5))
    dist.barrier()
    if dist.get_rank() == victim:
        os.kill(os.getpid(), sign)
    try:
        with heart.naming_missing_ranks():
            dist.all_reduce(torch.zeros(1), group=group)
    except MissingRankError as error:
        return str(error), error.ranks
    finally:
        heart.stop()
    return "", []


def _survivors(sign: signal.Signals) -> list[tuple[str, list[int]]]:
    group = Group(3)
    try:
        for pipe in group.pipes:
            pipe.send((_wait_for_victim, (2, sign)))
        return [pipe.recv()[1] for pipe in group.pipes[:2]]
    finally:
        group.processes[2].kill()
        group.close()


def test_names_a_killed_rank() -> None:
    for message, ranks in _survivors(signal.SIGKILL):
        assert ranks == [2]
        assert "rank 2 is missing" in message


def test_names_a_hanging_rank() -> None:
    for _, ranks in _survivors(signal.SIGSTOP):
        assert ranks == [2]


@pytest.mark.parametrize(("beating", "missing", "intervals"), [((1, 2), [], 1), ((1,), [2], PATIENCE)])
def test_looks_until_all_have_beaten(
    monkeypatch: pytest.MonkeyPatch, beating: tuple[int, ...], missing: list[int], intervals: int
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    hearts = [Heartbeat(store, rank, 3, timedelta(hours=1)) for rank in range(3)]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        for rank in beating:
            hearts[rank]._store.add(str(rank), 1)

    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(sleep=sleep))
    assert hearts[0].missing() == missing
    assert slept == [3600.0] * intervals
    for heart in hearts:
        heart.stop()


def _error_without_missing_rank() -> str:
    heart = Heartbeat(default_store(), dist.get_rank(), dist.get_world_size(), timedelta(seconds=1))
    try:
        with heart.naming_missing_ranks():
            raise RuntimeError("something else")
    except RuntimeError as error:
        dist.barrier()  # the others still look for this rank's beat
        return f"{type(error).__name__}: {error}"
    finally:
        heart.stop()


def test_passes_other_errors_on(groups: Groups) -> None:
    assert groups(2).run(_error_without_missing_rank) == ["RuntimeError: something else"] * 2


def test_the_error_travels_between_processes() -> None:
    for error in (MissingRankError([1, 2], timedelta(seconds=5)), MissingRankError([1], timedelta(0), "rank 1 ended")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.ranks) == (str(error), error.ranks)


ENDING_RANK = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from hecate.collectives.queue import HostQueue
from hecate.private_torch import default_store
from hecate.ranks.heartbeat import Heartbeat

rank, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(hours=1))
heart = Heartbeat(default_store(), rank, 3)
dist.barrier()
if rank == 2 and how == "raises":
    begun = []
    HostQueue().start(lambda: (begun.append(1), dist.recv(torch.zeros(1), 0)))  # nobody sends that
    while not begun:
        time.sleep(0.01)
    raise ValueError("bad data")
if rank == 2:
    sys.exit(0)
with heart.naming_missing_ranks():
    dist.all_reduce(torch.zeros(1))
"""


@pytest.mark.parametrize(
    ("how", "code", "why"),
    [("raises", 1, "rank 2 ended, last uncaught exception: ValueError: bad data"), ("exits", 0, "rank 2 ended")],
)
def test_says_why_a_rank_ended(how: str, code: int, why: str) -> None:
    """The dead rank is reported although the timeout is an hour and a collective with it is in progress."""
    port = str(free_port())
    ranks = [Program(("-c", ENDING_RANK, str(rank), port, how)) for rank in range(3)]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert ranks[2].returncode == code, errors[2]
    for process, error in list(zip(ranks, errors, strict=True))[:2]:
        assert process.returncode == 1
        assert f"MissingRankError: rank 2 is missing: {why}\n" in error
