"""Communication: process groups, the transport of experts, and lanes that run it in parallel with compute.

On CUDA, each lane is a side stream: work is launched and completed there, and `wait()` makes the compute stream wait
for an event; the host does not wait. On CPU, the backend's threads do the work, and `wait()` blocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hecate.collectives.choice import symmetric_transports, wanted
from hecate.collectives.groups import release, transport_of
from hecate.collectives.route import Links
from hecate.collectives.symmetric import Symmetric
from hecate.collectives.transport import Transport, Work
from hecate.config import TransportChoice
from hecate.cost import CostModel
from hecate.labels import Verb, label
from hecate.placement import Topology
from hecate.private_torch import nccl_options, timeout_of
from hecate.ranks.backend import backend_of
from hecate.ranks.heartbeat import Heartbeat
from hecate.ranks.messages import all_reduce
from hecate.runtime.arena import Arena

__all__ = ["WHOLE_STEP", "Comms", "ExposedTime", "Lane", "Pending", "StepTimes", "destroy", "make_comms"]


MAX_CTAS = 8
"""Most SMs that one collective of expert rows takes on NCCL.

Copies and gradients travel beside compute, which needs the SMs; the links between nodes need few to be full. It is also
what lets the kernels of all process groups be on the device at once (see `make_comms`): NCCL by itself may take 32 for
each group, and five groups would not fit on 132 SMs. The number is not measured.
"""


WHOLE_STEP = -1
"""In place of a layer's index: what a step does for all layers at once."""
WAITS: tuple[Verb, ...] = ("gather", "reduce", "average")
"""Verbs in which compute waits for expert rows; the others are times of the host."""


class StepTimes:
    """What one step has spent besides compute, per layer and verb. Made by `ExposedTime`."""

    def __init__(self, clock: ExposedTime, step: int) -> None:
        self._clock = clock
        self._seconds: dict[int, dict[Verb, float]] = {}
        self.step = step

    def seconds(self, layer: int) -> float:
        """Seconds for which compute waited for expert rows of one layer; see `by_verb`."""
        return sum(seconds for verb, seconds in self.by_verb(layer).items() if verb in WAITS)

    def by_verb(self, layer: int) -> dict[Verb, float]:
        """Seconds of one layer, or of `WHOLE_STEP`, by verb; those with none are left out.

        Waits until the device has gone through the step's waits: keep it off the hot path.
        """
        self._clock.drain(self.step)
        return dict(self._seconds.get(layer, {}))

    def add(self, layer: int, verb: Verb, seconds: float) -> None:
        """Add to the time of one layer."""
        of_layer = self._seconds.setdefault(layer, {})
        of_layer[verb] = of_layer.get(verb, 0.0) + seconds


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
        self._running: deque[tuple[StepTimes, int, Verb, _Events]] = deque()  # in the order of the waits
        self._spare: list[_Events] = []

    def wait(self, layer: int, blocking: Callable[[], None], on_cuda: bool, verb: Verb = "gather") -> None:
        """Run `blocking` and add the time that compute waits for it to that of `layer`."""
        if on_cuda:
            self.drain()
            before, after = events = self._spare.pop() if self._spare else _new_events()
            before.record()
            blocking()
            after.record()
            self._running.append((self.now, layer, verb, events))
            return
        start = time.perf_counter()
        blocking()
        self.now.add(layer, verb, time.perf_counter() - start)

    @contextmanager
    def on_host(self, verb: Verb, layer: int = WHOLE_STEP, name: str = "") -> Iterator[None]:
        """A `label` whose time of the host is added to that of `layer`."""
        start = time.perf_counter()
        with label(verb, name):
            yield
        self.now.add(layer, verb, time.perf_counter() - start)

    def take(self) -> StepTimes:
        """End the step; returns its times."""
        taken, self.now = self.now, StepTimes(self, self.now.step + 1)
        return taken

    def drain(self, step: int = -1) -> None:
        """Read the events of waits that are over; those up to `step` are waited for."""
        while self._running:
            times, layer, verb, (before, after) = self._running[0]
            if times.step <= step:
                after.synchronize()
            elif not after.query():
                return
            times.add(layer, verb, before.elapsed_time(after) / 1e3)
            self._spare.append(self._running.popleft()[3])


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
    """Runs one kind of communication (expert copies, or gradients) in the order of its calls.

    Args:
        device: device of the experts.
        exposed: counts the time of waits.
        verb: what profiles call the waits, as in "hecate::gather wait".

    Attributes:
        arena: memory for rows that are packed to be sent, and for rows that arrive.
    """

    def __init__(self, device: torch.device, exposed: ExposedTime, verb: Verb) -> None:
        self.arena = Arena(device)
        self.on_cuda = device.type == "cuda"
        self._exposed = exposed
        self._verb = verb
        self._stream = torch.cuda.Stream(device) if self.on_cuda else None

    def start(self, layer: int, launch: Callable[[], Work]) -> Pending:
        """Launch communication that begins after all compute issued so far.

        Args:
            layer: index of the layer for which waiting time is counted.
            launch: starts the work. Tensors that it uses must not be changed until `wait()`.
        """
        if self._stream is None:
            work = launch()
            return Pending(lambda: self._wait(layer, work.wait), launch)
        self._stream.wait_stream(torch.cuda.current_stream())
        with self._current():
            launch().wait()
            done = torch.cuda.Event()
            done.record()
        return Pending(lambda: self._wait(layer, lambda: torch.cuda.current_stream().wait_event(done)), launch)

    def _wait(self, layer: int, blocking: Callable[[], None]) -> None:
        with label(self._verb, "wait"):
            self._exposed.wait(layer, blocking, self.on_cuda, self._verb)

    def _current(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


@dataclass(frozen=True)
class Comms:
    """Process groups, transport and lanes; made once and shared by all layers.

    Attributes:
        rank: this device's rank among those that share the experts.
        topology: topology of these devices.
        tokens: process group of the token exchange; None on one device.
        experts: transport of rows that change owners or are saved: messages of the group of copies; None on one device.
        gathers: transport of copies; the same object, or symmetric memory; None on one device.
        reductions: transport of gradients, over a process group of its own: messages of one group, and kernels of one
            NCCL communicator, run in starting order; None on one device.
        replicas: process group of the devices that own the same experts; None without a (replicate, shard) mesh.
        copies: lane of SparseAllGather (copies of experts), so that prefetch overlaps with compute.
        gradients: lane of SparseReduceScatter (gradients of experts), so that a reduction does not queue behind the
            next layer's copies.
        averages: lane of the all-reduce over replicas, so that it does not hold up the next layer's gradients.
        exposed: time that compute waited for communication.
        heart: finds out which ranks are missing; None without a process group.
    """

    rank: int
    topology: Topology
    tokens: dist.ProcessGroup | None
    experts: Transport | None
    gathers: Transport | None
    reductions: Transport | None
    replicas: dist.ProcessGroup | None
    copies: Lane
    gradients: Lane
    averages: Lane
    exposed: ExposedTime
    heart: Heartbeat | None

    @property
    def gradient_scale(self) -> float:
        """1 / number of devices that share the experts, because gradients are averaged as in DDP and FSDP.

        The average over replicas comes in addition.
        """
        return 1.0 / self.topology.num_devices

    @property
    def transport(self) -> str | None:
        """What carries copies and gradients: "symmetric", or the backend that sends them; None on one device."""
        if self.gathers is None:
            return None
        on = "cuda" if self.copies.on_cuda else "cpu"
        return "symmetric" if isinstance(self.gathers, Symmetric) else backend_of(self.gathers.group, on)

    def trim(self) -> None:
        """Free what the lanes' arenas have not lent since the last call."""
        for lane in (self.copies, self.gradients, self.averages):
            lane.arena.trim()

    def close(self) -> None:
        """End the threads and destroy the process groups, after running communication has ended. Not collective."""
        if self.heart is not None:
            self.heart.stop()
        transports = [transport for transport in (self.gathers, self.reductions) if transport is not None]
        for transport in transports:
            transport.close()
        for group in filter(None, (self.tokens, *(transport.remaining_group for transport in transports))):
            release(group)
            destroy(group)

    def guard(self, exit_code: int | None = None) -> AbstractContextManager[None]:
        """A context in which a collective that fails names the ranks that are missing; see `Heartbeat`."""
        return nullcontext() if self.heart is None else self.heart.naming_missing_ranks(exit_code)


def destroy(group: dist.ProcessGroup) -> None:
    """Destroy a process group that Hecate made, unless `destroy_process_group()` has destroyed all groups before."""
    if dist.is_initialized():
        with suppress(ValueError, KeyError):  # torch does not know the group any more
            dist.destroy_process_group(group)


def make_comms(
    mesh: DeviceMesh | None,
    device: torch.device,
    cost: CostModel,
    heart: Heartbeat | None,
    transport: TransportChoice = "messages",
    wires: Sequence[torch.dtype] = (),
) -> Comms:
    """Make the `Comms` of the devices that share experts: those along the last dimension of `mesh`. Collective.

    Args:
        mesh: (shard,) or (replicate, shard); None on one device.
        device: of this rank's experts.
        cost: speeds of links.
        heart: finds out which ranks are missing.
        transport: of copies and gradients, see `FSSDPConfig`.
        wires: dtypes in which gradients are sent.

    Tokens, copies and gradients have a process group each, so that none queues behind another. With re-materialization
    the backward pass launches the gradients of layer i, then the copies of layer i - 1, which it needs first.

    Several groups at once do not deadlock, because every rank launches the collectives of all groups in one order: the
    passes decide it, from plans that are equal on all ranks, and launch from one thread at a time. Take the first in
    this order that has not ended. All ranks launch it without waiting for a later one, and on no stream is anything
    before it. So over gloo its messages are met, and on NCCL its kernels start once there are free SMs, which is what
    `MAX_CTAS` is for; then it ends. In another order on one rank, two kernels could each wait for the other's peers.

    Over symmetric memory the same holds: a kernel that waits for other ranks is one CTA, and what it waits for is
    launched before anything that waits for it.

    A group over gloo costs each rank a few threads and a connection per other rank; `Comms.close` gives them back.
    """
    exposed = ExposedTime()
    lanes = (Lane(device, exposed, "gather"), Lane(device, exposed, "reduce"), Lane(device, exposed, "average"))
    if mesh is None:
        return Comms(0, Topology(1, 1), None, None, None, None, None, *lanes, exposed, heart)
    shard = mesh.get_group(mesh.ndim - 1)
    topology = Topology.detect(shard.size())
    ranks = mesh.mesh.view(-1, shard.size()).tolist()
    tokens = _new_group(ranks, shard, device, None)
    links = Links.of(cost, topology, device.type)
    groups = [_new_group(ranks, shard, device, MAX_CTAS) for _ in range(2)]
    sends, reduce = (transport_of(group, device.type, topology, links) for group in groups)
    gather = sends
    if wanted(transport, device) and topology.num_devices > 1:
        made = symmetric_transports(transport, groups, topology, links, device, wires)
        gather, reduce = (gather, reduce) if made is None else made
    replicas = mesh.get_group(0) if mesh.ndim == 2 else None
    return Comms(shard.rank(), topology, tokens, sends, gather, reduce, replicas, *lanes, exposed, heart)


def _new_group(
    ranks: list[list[int]], like: dist.ProcessGroup, device: torch.device, max_ctas: int | None
) -> dist.ProcessGroup:
    """Make one new process group per row of `ranks`, with the timeout of `like`; returns this rank's group.

    With `max_ctas` and NCCL, its collectives take at most as many SMs, at a high priority: they are short of time, and
    kernels of compute that are queued already must not go first.
    """
    timeout = timeout_of(like, device.type)
    over_nccl = backend_of(like, device.type) == "nccl"
    options = nccl_options(timeout, max_ctas) if over_nccl and max_ctas is not None else None
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout, pg_options=options)
    # NCCL allows point-to-point calls between only some ranks after a first collective of all ranks.
    all_reduce(torch.zeros(1, device=device), group=group)
    return group
