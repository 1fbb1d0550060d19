"""A rank that dies is named by those that live on."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from hecate.errors import MissingRankError
from hecate.private_torch import default_store
from hecate.ranks.heartbeat import Heartbeat
from tests.workers import Group


def _wait_for_victim(victim: int, sign: signal.Signals) -> tuple[str, list[int]]:
    heart = Heartbeat(default_store(), dist.get_rank(), dist.get_world_size(), timedelta(seconds=0.2))
    dist.barrier()
    if dist.get_rank() == victim:
        os.kill(os.getpid(), sign)
    try:
        with heart.naming_missing_ranks():
            dist.all_reduce(torch.zeros(1))
    except MissingRankError as error:
        return str(error), error.ranks
    finally:
        heart.stop()
    return "", []


def _survivors(sign: signal.Signals) -> list[tuple[str, list[int]]]:
    group = Group(3, timeout=timedelta(seconds=5))
    try:
        for pipe in group.pipes:
            pipe.send((_wait_for_victim, (2, sign)))
        return [pipe.recv()[1] for pipe in group.pipes[:2]]
    finally:
        os.kill(group.processes[2].pid, signal.SIGKILL)
        group.close()


def test_names_a_killed_rank() -> None:
    for message, ranks in _survivors(signal.SIGKILL):
        assert ranks == [2]
        assert "rank 2 is missing" in message


def test_names_a_hanging_rank() -> None:
    for _, ranks in _survivors(signal.SIGSTOP):
        assert ranks == [2]


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


def test_passes_other_errors_on() -> None:
    group = Group(2)
    try:
        assert group.run(_error_without_missing_rank) == ["RuntimeError: something else"] * 2
    finally:
        group.close()
