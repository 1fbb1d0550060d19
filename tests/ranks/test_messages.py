"""Collectives staged through host memory, on a CPU whose tensors are treated as an accelerator's."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hecate.collectives import groups as of_groups
from hecate.collectives.moves import moves_between
from hecate.collectives.on_host import RoutedOnHost
from hecate.collectives.queue import HostQueue
from hecate.collectives.through_host import ThroughHost
from hecate.placement import Placement, Topology
from hecate.ranks import messages
from hecate.runtime.arena import Arena
from hecate.runtime.experts.buffers import memory_slots
from hecate.runtime.experts.slots import SlotsWatch
from tests.collectives.cases import FINE
from tests.runtime.helpers import SLOW_NODES, Pair, devices_per_node, gpt, lm_loss
from tests.workers import Groups

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", messages.GATHER, "all_to_all_single")
CALLS = (*COLLECTIVES, "send", "recv", "isend", "irecv")


def tensors_of(*arguments: object) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from tensors_of(*argument)


class Accelerator:
    """Treats all tensors as if gloo were the backend of their accelerator, and counts the calls of each collective.

    A collective that gets other memory than that of host copies is an error.
    """

    def __init__(self) -> None:
        self.called: dict[str, int] = dict.fromkeys(CALLS, 0)
        self.on_device: set[StorageWeakRef] = set()
        self._copies: set[StorageWeakRef] = set()

    def _host_like(self, tensor: Tensor) -> Tensor:
        copy = torch.full(tensor.shape, 77, dtype=tensor.dtype)
        self._copies.add(StorageWeakRef(copy.untyped_storage()))
        return copy

    def _checked(self, name: str) -> Callable[..., Any]:
        call = getattr(dist, name)

        def checked(*args: Any, **kwargs: Any) -> Any:
            self.called[name] += 1
            for tensor in tensors_of(*args):
                memory = StorageWeakRef(tensor.untyped_storage())
                # Transports have memory of their own besides.
                good = memory not in self.on_device if name in ("isend", "irecv") else memory in self._copies
                assert good, f"{name} got memory of the device"
            return call(*args, **kwargs)

        return checked

    @contextmanager
    def __call__(self) -> Iterator[Accelerator]:
        with (
            mock.patch.object(messages, "staged", return_value=True),
            mock.patch.object(messages, "host_like", self._host_like),
            mock.patch("hecate.collectives.through_host.host_like", self._host_like),
            mock.patch.object(of_groups, "_make", through_host),
            mock.patch.multiple(dist, **{name: self._checked(name) for name in CALLS}),
        ):
            yield self


def through_host(group: dist.ProcessGroup, device: str, topology: Topology, links: Any, queue: HostQueue) -> Any:
    return ThroughHost(RoutedOnHost(group, topology, links, queue))


def every_call() -> dict[str, int]:
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    with Accelerator()() as seen:
        total = torch.arange(3.0) + rank
        messages.all_reduce(total)()
        assert total.tolist() == [1, 3, 5]
        largest = torch.tensor(rank)
        messages.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True)()
        assert largest.item() == 1
        value = torch.full((2,), rank + 5.0, dtype=torch.bfloat16)
        messages.broadcast(value, group_src=1)
        assert value.tolist() == [6, 6]
        table = torch.zeros(2, 3, dtype=torch.int64)
        messages.all_gather(table.unbind(0), torch.full((3,), rank + 1))
        assert table.tolist() == [[1] * 3, [2] * 3]
        table.zero_()
        messages.all_gather_into(table.view(-1), torch.full((3,), rank + 4), async_op=True)()
        assert table.tolist() == [[4] * 3, [5] * 3]
        sent, received = ([1, 2], [1, 0]) if rank == 0 else ([0, 1], [2, 1])
        out = torch.zeros(sum(received), 2)
        messages.all_to_all(out, torch.arange(2.0 * sum(sent)).view(-1, 2) + 10 * rank, received, sent)
        assert out.tolist() == ([[0, 1]] if rank == 0 else [[2, 3], [4, 5], [10, 11]])
        back = torch.zeros(2, dtype=torch.int64)
        messages.all_to_all(back, torch.tensor([rank, rank + 10]))
        assert back.tolist() == ([0, 1] if rank == 0 else [10, 11])
        if rank == 0:
            messages.send(torch.tensor([1.5, 2.5]), None, other)
        else:
            arrived = torch.zeros(2)
            messages.recv(arrived, None, other)
            assert arrived.tolist() == [1.5, 2.5]
    return seen.called


def both_directions() -> None:
    rank, numel = dist.get_rank(), 1 << 16
    owner, everywhere = Placement.from_owners([0, 1], 2), Placement([[True] * 2] * 2)
    moves = moves_between(owner, everywhere)
    with Accelerator()() as seen:
        transport = of_groups._make(dist.group.WORLD, "cuda", Topology(2, 2), FINE, HostQueue())  # type: ignore[arg-type]
        own, other, total = torch.full((numel,), rank + 1.0), torch.zeros(numel), torch.zeros(numel)
        seen.on_device = {StorageWeakRef(row.untyped_storage()) for row in (own, other, total)}
        work = transport.gather(moves, {rank: own}, {1 - rank: other})
        assert other.eq(0).all(), "written back before it was waited for"
        work.wait()
        assert other.eq(2.0 - rank).all()
        home = transport.reduce(moves.reversed, {rank: own, 1 - rank: other}, {rank: total}, torch.float32)
        home.wait()
        assert total.eq(2 * (rank + 1.0)).all()


def training() -> dict[str, int]:
    """The sharded model against the plain one, with copies of experts, and an exchange between two nodes."""
    with Accelerator()() as seen, devices_per_node(1):
        pair = Pair(gpt(), dense="replicate", rematerialize=True, cost=SLOW_NODES)
        pair.warm_up(lm_loss(0))
        pair.backward(lm_loss(1))
        assert any(layer["copies"] for layer in pair.engine.stats()["layers"])
    pair.check_gradients()  # by full tensors, which are gathered by torch itself
    return seen.called


def test_every_collective_gets_host_copies_and_their_values_come_back(groups: Groups) -> None:
    called = groups(2).run(every_call)
    assert [called[0][name] + called[1][name] for name in CALLS] == [4, 2, 2, 2, 4, 1, 1, 0, 0]
    groups(2).run(both_directions)
    for trained in groups(2).run(training):
        assert min(trained[name] for name in COLLECTIVES if name != "all_gather") > 0
        assert trained["isend"] + trained["irecv"] > 0


@pytest.mark.parametrize("backends", ["cpu:gloo,cuda:gloo", "cpu:gloo,cuda:nccl"])
def test_the_backend_for_the_device_decides(backends: str) -> None:
    with mock.patch.object(dist, "get_backend_config", return_value=backends):
        assert messages.staged(None, torch.device("cuda", 0)) == (backends == "cpu:gloo,cuda:gloo")  # type: ignore[arg-type]
        assert not messages.staged(None, torch.device("cpu"))  # type: ignore[arg-type]


def test_free_memory_is_divided_by_the_processes_that_share_the_gpu() -> None:
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(memory_slots="auto", memory_share=0.5, rematerialize=False),
        policy=SimpleNamespace(copies=True, keeps=False),
        device=torch.device("cuda", 0),
        num_devices=4,
        layers=[None],
    )
    slots = []
    for setup.sharers in (1, 2, 4):
        with (
            mock.patch.object(torch.cuda, "mem_get_info", return_value=(4000, 8000)),
            mock.patch.object(torch, "tensor", lambda value, device: value),
            mock.patch("hecate.runtime.experts.buffers.all_reduce"),
        ):
            slots.append(memory_slots(setup, 8, 1000, 4))
    assert slots == [2, 1, 0]
    with (
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(4000, 8000)),
        mock.patch.object(torch.cuda, "memory_reserved", return_value=700),
        mock.patch.object(torch.cuda, "memory_allocated", return_value=600),
    ):
        layers: Any = [SimpleNamespace(comms=mock.Mock(), memory_slots=1)]
        watch = SlotsWatch(setup, layers, None, Arena(torch.device("cpu")))
        assert watch._free() == 1000 + 100  # of four processes; what this one's allocator keeps is its own


PACKAGE = Path(__file__).parents[2] / "hecate"
DOORS = {"ranks/messages.py", "collectives/on_host.py", "collectives/on_stream.py"}
TORCHS_OWN = {"train/distributed.py"}  # its groups have NCCL for CUDA


def test_nobody_calls_torchs_collectives_on_tensors_past_the_door() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist"
        }
        if name not in DOORS | TORCHS_OWN:
            assert not used & {*CALLS, "batch_isend_irecv", "reduce_scatter_tensor"}, name
