"""Which transport a process group gets, and that it is freed with the group."""

from __future__ import annotations

import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hecate.collectives import groups as of_groups
from hecate.collectives.groups import release, transport_of
from hecate.collectives.moves import moves_between
from hecate.collectives.on_host import RoutedOnHost
from hecate.collectives.on_stream import RoutedOnStream
from hecate.collectives.through_host import ThroughHost
from hecate.collectives.transport import Transport
from hecate.placement import Placement, Topology
from tests.collectives.cases import FINE, PORTS
from tests.workers import Groups

BOTH = "cpu:gloo,cuda:nccl"


class FourRanks:
    """A stand-in for a process group with what is needed to make transports."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 0


def choose(backends: str, device_type: str, per_node: int) -> Transport:
    with mock.patch.object(dist, "get_backend_config", return_value=backends):
        return transport_of(FourRanks(), device_type, Topology(4, per_node), FINE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backends", "device_type", "per_node", "kind"),
    [
        (BOTH, "cuda", 4, RoutedOnStream),
        (BOTH, "cuda", 2, RoutedOnStream),
        ("cuda:nccl", "cuda", 1, RoutedOnStream),
        (BOTH, "cpu", 4, RoutedOnHost),
        ("cpu:gloo,cuda:gloo", "cpu", 2, RoutedOnHost),
        ("cpu:gloo,cuda:gloo", "cuda", 2, ThroughHost),
    ],
)
def test_the_backend_for_the_device_decides(
    backends: str, device_type: str, per_node: int, kind: type[Transport]
) -> None:
    assert type(choose(backends, device_type, per_node)) is kind


@pytest.mark.parametrize(
    ("backends", "device_type", "message"),
    [
        ("cpu:mpi", "cpu", r"backend for cpu is mpi; must be nccl for cuda, or gloo"),
        ("cuda:nccl", "cpu", r"backends \{'cuda': 'nccl'\}, none for device type 'cpu'"),
    ],
)
def test_a_backend_that_cannot_carry_the_rows_is_refused(backends: str, device_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(backends, device_type, 4)


def ask_twice() -> None:
    group, topology = dist.new_group(), Topology(2, 2)
    first = transport_of(group, "cpu", topology, FINE)
    assert transport_of(group, "cpu", Topology(2, 2), FINE) is first
    others = [transport_of(group, "cpu", Topology(2, 1), FINE), transport_of(group, "cpu", topology, PORTS)]
    assert len({id(t) for t in (first, *others)}) == 3
    assert {t._queue for t in others} == {first._queue}, "messages of one group must go through one queue"
    with pytest.raises(ValueError, match="num_devices=3, the process group 2 ranks"):
        transport_of(group, "cpu", Topology(3, 3), FINE)


def test_a_group_has_one_transport_for_a_topology_and_links(groups: Groups) -> None:
    groups(2).run(ask_twice)


def queue_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "hecate-collectives"}


def pass_on(transport: Transport, ranks: int) -> None:
    """A gather whose pieces are relayed, so that it needs the queue's thread on some rank."""
    rank, numel = dist.get_rank(), 1 << 18
    src, dst = Placement.from_owners([0], ranks), Placement([[True] * ranks])
    row = torch.full((numel,), 7.0)
    rows = ({0: row}, {}) if rank == 0 else ({}, {0: torch.zeros(numel)})
    transport.gather(moves_between(src, dst), *rows).wait()
    assert rank == 0 or torch.equal(rows[1][0], row)


def use(group: dist.ProcessGroup) -> Transport:
    transport = transport_of(group, "cpu", Topology(3, 3), FINE)
    pass_on(transport, 3)
    transport._queue.start(lambda: None).wait()  # every rank has a thread now
    return transport


def release_a_group() -> None:
    group, before = dist.new_group(), queue_threads()
    transport = use(group)
    assert len(queue_threads() - before) == 1
    release(group)
    assert queue_threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        pass_on(transport, 3)
    dist.barrier()
    use(group)
    release(group)
    release(group)
    assert queue_threads() == before


def test_release_ends_the_thread(groups: Groups) -> None:
    groups(3).run(release_a_group)


def destroy_a_group() -> None:
    group, before = dist.new_group(), queue_threads()
    transport = weakref.ref(use(group))
    assert transport() is not None
    (thread,) = queue_threads() - before
    dist.destroy_process_group(group)
    registered = len(of_groups._GROUPS)
    del group
    gc.collect()
    assert transport() is None
    assert len(of_groups._GROUPS) == registered - 1
    thread.join(60)
    assert not thread.is_alive()


def test_a_destroyed_group_leaves_neither_transport_nor_thread(groups: Groups) -> None:
    groups(3).run(destroy_a_group)
