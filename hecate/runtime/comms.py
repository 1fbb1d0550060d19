"""Communication: process groups, the transport of experts, and lanes that run it in parallel with compute.

On CUDA, each lane is a side stream: work is launched and completed there, and `wait()` makes the compute stream wait
for an event; the host does not wait. On CPU, the backend's threads do the work, and `wait()` blocks.
"""

from __future__ import annotations

import time
from collections import deque
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

__all__ = ["Comms", "ExposedTime", "Lane", "Pending", "StepTimes", "destroy", "make_comms"]


class StepTimes:
    """Time that compute has waited for communication in one step, per layer. Made by `ExposedTime`."""

    def __init__(self, clock: ExposedTime, step: int) -> None:
        self._clock = clock
        self._seconds: dict[int, float] = {}
        self.step = step

    def seconds(self, layer: int) -> float:
        """Seconds of one layer. Waits until the device has gone through the step's waits: keep it off the hot path."""
        self._clock.drain(self.step)
        return self._seconds.get(layer, 0.0)

    def add(self, layer: int, seconds: float) -> None:
        """Add to the time of one layer."""
        self._seconds[layer] = self._seconds.get(layer, 0.0) + seconds


class ExposedTime:
    """Measures how long compute waits for communication, step by step.

    On CUDA two timing events enclose each wait. At the next wait, pairs that the device has passed are read and used
    again, and the host waits for none. So there are only as many pairs as waits that the device is behind the host,
    also in long evaluations, where no optimizer step comes.

    Attributes:
        now: the times of the step under way.
    """

    def __init__(self) -> None:
        self.now = StepTimes(self, 0)
        self._running: deque[tuple[StepTimes, int, _Events]] = deque()  # in the order of the waits
        self._spare: list[_Events] = []

    def wait(self, layer: int, blocking: Callable[[], None], on_cuda: bool) -> None:
        """Run `blocking` and add the time that compute waits for it to that of `layer`."""
        if on_cuda:
            self.drain()
            before, after = events = self._spare.pop() if self._spare else _new_events()
            before.record()
            blocking()
            after.record()
            self._running.append((self.now, layer, events))
            return
        start = time.perf_counter()
        blocking()
        self.now.add(layer, time.perf_counter() - start)

    def take(self) -> StepTimes:
        """End the step; returns its times."""
        taken, self.now = self.now, StepTimes(self, self.now.step + 1)
        return taken

    def drain(self, step: int = -1) -> None:
        """Read the events of waits that are over; those up to `step` are waited for."""
        while self._running:
            times, layer, (before, after) = self._running[0]
            if times.step <= step:
                after.synchronize()
            elif not after.query():
                return
            times.add(layer, before.elapsed_time(after) / 1e3)
            self._spare.append(self._running.popleft()[2])


_Events = tuple[torch.cuda.Event, torch.cuda.Event]


def _new_events() -> _Events:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


class Pending:
    """Communication under way on a lane.

    Args:
        wait: makes compute wait for the results.
        kept: an object that holds the memory in use; kept alive until `wait()` has ordered the streams. The memory
            belongs to the compute stream, whose allocator could otherwise reuse it while a side stream still reads it.
    """

    def __init__(self, wait: Callable[[], None], kept: object = None) -> None:
        self._wait: Callable[[], None] | None = wait
        self._kept = kept

    def wait(self) -> None:
        """Make compute wait for the results; further calls do nothing."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()
        self._kept = None


class Lane:
    """Runs one kind of communication (expert copies, or gradients) in the order of its calls."""

    def __init__(self, device: torch.device, exposed: ExposedTime) -> None:
        self.on_cuda = device.type == "cuda"
        self._exposed = exposed
        self._stream = torch.cuda.Stream(device) if self.on_cuda else None

    def start(self, layer: int, launch: Callable[[], Work]) -> Pending:
        """Launch communication that begins after all compute issued so far.

        Args:
            layer: index of the layer for which waiting time is counted.
            launch: starts the work. Tensors that it uses must not be changed until `wait()`.
        """
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
    """Process groups, transport and lanes; made once and shared by all layers.

    Attributes:
        rank: this device's rank among those that share the experts.
        topology: topology of these devices.
        tokens: process group of the token exchange; None on one device.
        experts: transport of copies and gradients; None on one device.
        replicas: process group of the devices that own the same experts; None without a (replicate, shard) mesh.
        copies: lane of SparseAllGather (copies of experts), so that prefetch overlaps with compute.
        gradients: lane of SparseReduceScatter (gradients of experts), so that a reduction does not queue behind the
            next layer's copies.
        exposed: time that compute waited for communication.
        heart: finds out which ranks are missing; None without a process group.
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
        """1 / number of devices that share the experts, because gradients are averaged as in DDP and FSDP.

        The average over replicas comes in addition.
        """
        return 1.0 / self.topology.num_devices

    def close(self) -> None:
        """End the threads and destroy the process groups, after running communication has ended. Not collective."""
        if self.heart is not None:
            self.heart.stop()
        for group in filter(None, (self.tokens, None if self.experts is None else self.experts.group)):
            release(group)
            destroy(group)

    def guard(self) -> AbstractContextManager[None]:
        """A context in which a collective that fails names the ranks that are missing."""
        return nullcontext() if self.heart is None else self.heart.naming_missing_ranks()


def destroy(group: dist.ProcessGroup) -> None:
    """Destroy a process group that Hecate made, unless `destroy_process_group()` has destroyed all groups before."""
    if dist.is_initialized():
        with suppress(ValueError, KeyError):  # torch does not know the group any more
            dist.destroy_process_group(group)


def make_comms(mesh: DeviceMesh | None, device: torch.device, cost: CostModel, heart: Heartbeat | None) -> Comms:
    """Make the `Comms` of the devices that share experts: those along the last dimension of `mesh`. Collective."""
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
    """Make one new process group per row of `ranks`, with the timeout of `like`; returns this rank's group."""
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout_of(like, device.type))
    # NCCL allows point-to-point calls between only some ranks after a first collective of all ranks.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group
