"""Everything that talks: process groups, the transport of experts, and the lanes that run it beside compute.

On CUDA each lane is a side stream: work is launched and finished there, and `wait()` makes the compute stream wait for
an event, never the host. On CPU the backend's own threads carry it, and `wait()` blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hecate.collectives.groups import release, transport_of
from hecate.collectives.route import Links
from hecate.collectives.transport import Transport, Work
from hecate.cost import CostModel
from hecate.placement import Topology
from hecate.private_torch import timeout_of
from hecate.ranks.heartbeat import Heartbeat

__all__ = ["Comms", "ExposedTime", "Lane", "Pending", "destroy", "make_comms"]


class ExposedTime:
    """Seconds that compute waited, per layer."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, layer: int, blocking: Callable[[], None], on_cuda: bool) -> None:
        """Run `blocking` and book the time it holds up compute to `layer`."""
        if on_cuda:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            blocking()
            after.record()
            self._events.append((layer, before, after))
            return
        start = time.perf_counter()
        blocking()
        self._add(layer, time.perf_counter() - start)

    def take(self) -> ExposedTime:
        """What was booked so far, to be read later; starts again from zero."""
        taken = ExposedTime()
        taken._seconds, taken._events = self._seconds, self._events
        self._seconds, self._events = {}, []
        return taken

    def seconds(self, layer: int) -> float:
        """Of one layer. Waits for the device where events were recorded: not for the training loop's hot path."""
        for booked, before, after in self._events:
            after.synchronize()
            self._add(booked, before.elapsed_time(after) / 1e3)
        self._events = []
        return self._seconds.get(layer, 0.0)

    def _add(self, layer: int, seconds: float) -> None:
        self._seconds[layer] = self._seconds.get(layer, 0.0) + seconds


class Pending:
    """Communication under way on a lane.

    Args:
        wait: what to do for the results.
        kept: owner of the memory in use. It was allocated for the compute stream, which might hand it to the next
            tensor while a side stream still reads it, so it lives until `wait()` has ordered the two.
    """

    def __init__(self, wait: Callable[[], None], kept: object = None) -> None:
        self._wait: Callable[[], None] | None = wait
        self._kept = kept

    def wait(self) -> None:
        """Return when compute may use the results; further calls do nothing."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()
        self._kept = None


class Lane:
    """One kind of traffic (expert copies, gradients), in issue order."""

    def __init__(self, device: torch.device, exposed: ExposedTime) -> None:
        self.on_cuda = device.type == "cuda"
        self._exposed = exposed
        self._stream = torch.cuda.Stream(device) if self.on_cuda else None

    def start(self, layer: int, launch: Callable[[], Work]) -> Pending:
        """Launch after all compute issued so far. What `launch` uses must stay untouched until `wait()`."""
        if self._stream is None:
            work = launch()
            return Pending(lambda: self._exposed.wait(layer, work.wait, on_cuda=False), launch)
        self._stream.wait_stream(torch.cuda.current_stream())
        with self._current():
            launch().wait()
            done = torch.cuda.Event()
            done.record()
        return Pending(
            lambda: self._exposed.wait(layer, lambda: torch.cuda.current_stream().wait_event(done), on_cuda=True),
            launch,
        )

    def _current(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


@dataclass(frozen=True)
class Comms:
    """Process groups, transport and lanes: made once, shared by all layers.

    Attributes:
        rank: this device among those that share the experts.
        topology: of these devices.
        tokens: process group of the token exchange; None on one device.
        experts: transport of copies and gradients; None on one device.
        replicas: process group of the devices that own the same experts; None without a (replicate, shard) mesh.
        copies: lane of spAG, so that prefetch runs beside compute.
        gradients: lane of spRS, so that a reduction does not queue behind the next layer's copies.
        exposed: what compute waited for.
        heart: knows which ranks are missing; None without a process group.
    """

    rank: int
    topology: Topology
    tokens: dist.ProcessGroup | None
    experts: Transport | None
    replicas: dist.ProcessGroup | None
    copies: Lane
    gradients: Lane
    exposed: ExposedTime
    heart: Heartbeat | None

    @property
    def gradient_scale(self) -> float:
        """1 / number of these devices: gradients are averaged, as in DDP and FSDP; replicas are averaged on top."""
        return 1.0 / self.topology.num_devices

    def close(self) -> None:
        """End the threads and destroy the process groups, after what they carry has ended. Not collective."""
        if self.heart is not None:
            self.heart.stop()
        for group in filter(None, (self.tokens, None if self.experts is None else self.experts.group)):
            release(group)
            destroy(group)

    def guard(self) -> AbstractContextManager[None]:
        """A context in which a collective that fails names the ranks that are missing."""
        return nullcontext() if self.heart is None else self.heart.naming_missing_ranks()


def destroy(group: dist.ProcessGroup) -> None:
    """Destroy a group of our own, unless `destroy_process_group()` has destroyed all."""
    if dist.is_initialized():
        with suppress(ValueError, KeyError):  # torch does not know the group any more
            dist.destroy_process_group(group)


def make_comms(mesh: DeviceMesh | None, device: torch.device, cost: CostModel, heart: Heartbeat | None) -> Comms:
    """For the devices that share experts: the last dimension of `mesh`. Collective."""
    exposed = ExposedTime()
    lanes = (Lane(device, exposed), Lane(device, exposed))
    if mesh is None:
        return Comms(0, Topology(1, 1), None, None, None, *lanes, exposed, heart)
    shard = mesh.get_group(mesh.ndim - 1)
    topology = Topology.detect(shard.size())
    ranks = mesh.mesh.view(-1, shard.size()).tolist()
    tokens, experts = (_new_group(ranks, shard, device) for _ in range(2))
    replicas = mesh.get_group(0) if mesh.ndim == 2 else None
    transport = transport_of(experts, device.type, topology, Links.of(cost, topology, device.type))
    return Comms(shard.rank(), topology, tokens, transport, replicas, *lanes, exposed, heart)


def _new_group(ranks: list[list[int]], like: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """A process group of its own for each row of `ranks`, with the timeout of `like`; returns this rank's."""
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout_of(like, device.type))
    # Point-to-point calls between some ranks only are allowed after a first collective of all (NCCL).
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group
