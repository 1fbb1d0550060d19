"""The process groups of an engine: what each carries, with which options, and that none queues behind another."""

from __future__ import annotations

import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hecate.collectives.moves import moves_between
from hecate.cost import CostModel
from hecate.placement import Placement
from hecate.runtime import comms as of_comms
from hecate.runtime.comms import MAX_CTAS, make_comms
from tests.workers import Groups


def copies_beside_a_stuck_reduction() -> None:
    comms = make_comms(init_device_mesh("cpu", (2,)), torch.device("cpu"), CostModel.cpu(), None)
    assert comms.experts is not None
    assert comms.reductions is not None
    assert len({comms.tokens, comms.experts.group, comms.reductions.group}) == 3
    owner, everywhere = Placement.from_owners([0], 2), Placement([[True, True]])
    moves, rank, go_on = moves_between(owner, everywhere), dist.get_rank(), threading.Event()
    begun = threading.Event()
    stuck = comms.reductions._queue.start(lambda: (begun.set(), go_on.wait(60))[0])  # type: ignore[attr-defined]
    begun.wait(60)
    contributed, sums = {0: torch.full((4,), rank + 1.0)}, {0: torch.zeros(4)} if rank == 0 else {}
    home = comms.gradients.start(
        1,
        lambda: comms.reductions.reduce(moves.reversed, contributed, sums, torch.float32),  # type: ignore[union-attr]
    )
    copy = torch.zeros(4)
    rows = ({0: torch.full((4,), 7.0)}, {}) if rank == 0 else ({}, {0: copy})
    comms.copies.start(0, lambda: comms.experts.gather(moves, *rows)).wait()  # type: ignore[union-attr]
    assert rank == 0 or copy.eq(7).all()
    assert not go_on.is_set()
    go_on.set()
    stuck.wait()
    home.wait()
    assert rank == 1 or sums[0].eq(3).all()
    dist.barrier()
    comms.close()


def test_copies_do_not_queue_behind_gradients(groups: Groups) -> None:
    groups(2).run(copies_beside_a_stuck_reduction)


class Options:
    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self.config = SimpleNamespace(max_ctas=None)
        self._timeout: timedelta | None = None


def test_nccl_groups_of_experts_have_few_ctas_and_a_high_priority() -> None:
    asked: list[Any] = []

    def make(ranks: list[list[int]], timeout: timedelta, pg_options: Any) -> tuple[Any, list]:
        asked.append((timeout, pg_options))
        return object(), []

    group, hour = SimpleNamespace(), timedelta(hours=1)
    with (
        mock.patch.object(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), create=True),
        mock.patch.object(dist, "new_subgroups_by_enumeration", make),
        mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"),
        mock.patch.object(of_comms, "timeout_of", return_value=hour),
        mock.patch.object(of_comms, "all_reduce"),
        mock.patch.object(torch, "zeros"),
    ):
        for device, limit in (("cuda", None), ("cuda", MAX_CTAS), ("cuda", MAX_CTAS), ("cpu", MAX_CTAS)):
            of_comms._new_group([[0, 1]], group, torch.device(device), limit)  # type: ignore[arg-type]
    assert [timeout for timeout, _ in asked] == [hour] * 4
    tokens, copies, gradients, on_cpu = (options for _, options in asked)
    assert tokens is None
    assert on_cpu is None
    assert copies is not gradients, "torch writes the group's name into them"
    for options in (copies, gradients):
        assert (options.is_high_priority_stream, options.config.max_ctas, options._timeout) == (True, MAX_CTAS, hour)
