"""Which kernels are ordered before which, by streams and events; finds accesses to memory that are not.

Every stream has a clock, and knows up to which kernel of every other stream its next kernel waits: events carry that
knowledge from one stream to the other. NCCL's kernels run on a stream of their own per process group, which waits for
the stream that launches them, and for which `Work.wait()` lets the present stream wait. Memory belongs to the stream on
which it was allocated: as soon as nothing refers to it, that stream's next kernels may use it for something else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.cuda import _gpu_trace
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Streams"]

Stream = Hashable
Use = tuple[Stream, int, str]
"""Stream, its clock, and where in the code."""


@dataclass
class Memory:
    """Who uses a storage.

    Attributes:
        alive: whether anything refers to it still.
        owner: the stream that it was allocated on.
        write: the last write.
        reads: the last read since then, of each stream.
    """

    alive: StorageWeakRef
    owner: Stream
    write: Use | None = None
    reads: dict[Stream, Use] = field(default_factory=dict)


class Streams:
    """Follows all streams of one rank.

    Args:
        fault: called with the kind of a fault and what is wrong, in words.
        where: tells the line that runs.
    """

    def __init__(self, fault: Callable[[str, str], None], where: Callable[[], str]) -> None:
        self._fault, self._where = fault, where
        self._known: dict[Stream, dict[Stream, int]] = defaultdict(lambda: defaultdict(int))
        self._events: dict[int, dict[Stream, int]] = {}
        self._memory: dict[int, Memory] = {}
        self._shared: set[int] = set()  # keys of memory that other streams than the owner use
        self._freed: dict[Stream, list[Use]] = defaultdict(list)  # uses of freed memory, by the owner that gets it
        self._together: dict[Stream, int] | None = None  # what waiting for the running group call tells
        self._works: dict[int, tuple[dict[Stream, int], list[Tensor], list[Tensor]]] = {}
        self._launched = 0

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Context in which torch's events and works are followed."""
        _follow(self)
        wait = FakeWork.wait

        def waited(work: FakeWork, *args: object) -> bool:
            self._waited(work.seq_id)
            return wait(work)

        with mock.patch.object(FakeWork, "wait", waited):
            yield

    def kernel(self, reads: Iterable[Tensor], writes: Iterable[Tensor], fresh: Sequence[Tensor]) -> None:
        """A kernel on the current stream; `fresh` is memory allocated for it."""
        stream = _current()
        self._sweep()
        if fresh:
            self._check_freed(stream)
        for tensor in fresh:
            storage = tensor.untyped_storage()
            self._memory[storage._cdata] = Memory(StorageWeakRef(storage), stream)
            self._shared.discard(storage._cdata)
        self._use(stream, reads, writes)

    def launch(self, group: str, work: FakeWork, reads: list[Tensor], writes: list[Tensor]) -> None:
        """A kernel of NCCL."""
        stream = ("nccl", group)
        _merge(self._known[stream], self._known[_current()])
        self._use(stream, reads, writes)
        self._launched += 1
        work.seq_id = self._launched
        known = defaultdict(int) if self._together is None else self._together
        _merge(known, self._known[stream])
        self._works[work.seq_id] = (known, reads, writes)

    @contextmanager
    def group_call(self) -> Iterator[None]:
        """Context of a group call, which ends as a whole: to wait for one of its messages is to wait for all."""
        self._together = defaultdict(int)
        try:
            yield
        finally:
            self._together = None

    def recorded(self, event: int, stream: int) -> None:
        """An event was recorded on a stream."""
        self._events[event] = dict(self._known[stream])

    def waits(self, event: int, stream: int) -> None:
        """A stream waits for an event."""
        _merge(self._known[stream], self._events.get(event, {}))

    def host_waits(self) -> None:
        """The host waits for an event, a stream or the device."""
        self._fault("host wait", "the host waits for the device")

    def _waited(self, number: int) -> None:
        """The present stream waits for NCCL; only then is the memory not held by torch any more."""
        if number in self._works:
            known, reads, writes = self._works.pop(number)
            stream = _current()
            _merge(self._known[stream], known)
            self._use(stream, reads, writes)

    def _use(self, stream: Stream, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        known = self._known[stream]
        known[stream] += 1
        now = (stream, known[stream], self._where())
        for tensor in reads:
            memory = self._of(tensor, stream)
            if memory.write is not None:
                self._check(known, memory.write, now, "reads what is written by")
            memory.reads[stream] = now
        for tensor in writes:
            memory = self._of(tensor, stream)
            for use in [*memory.reads.values(), *([memory.write] if memory.write else [])]:
                self._check(known, use, now, "writes what is used by")
            memory.write, memory.reads = now, {}

    def _of(self, tensor: Tensor, stream: Stream) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        memory = self._memory.get(key)
        if memory is None or memory.alive.expired():
            memory = self._memory[key] = Memory(StorageWeakRef(storage), stream)
        if memory.owner != stream:
            self._shared.add(key)
        return memory

    def _check(self, known: dict[Stream, int], before: Use, now: Use, does: str) -> None:
        if known[before[0]] < before[1]:
            self._fault("streams", f"{now[2]} {does} {before[2]}, on another stream for which it does not wait")

    def _sweep(self) -> None:
        """Memory that nothing refers to any more goes back to its owner."""
        for key in [k for k in self._shared if self._memory[k].alive.expired()]:
            self._shared.discard(key)
            memory = self._memory.pop(key)
            uses = [*memory.reads.values(), *([memory.write] if memory.write else [])]
            self._freed[memory.owner] += [use for use in uses if not _is_nccl(use[0])]

    def _check_freed(self, owner: Stream) -> None:
        """A stream that allocates may get any memory that it has back: it must have waited for all uses."""
        known = self._known[owner]
        for stream, clock, where in self._freed.pop(owner, ()):
            if known[stream] < clock:
                self._fault("streams", f"freed memory is allocated again while {where} uses it on another stream")


def _is_nccl(stream: Stream) -> bool:
    """PyTorch holds the memory of NCCL's kernels until their work was waited for."""
    return isinstance(stream, tuple)


def _merge(into: dict[Stream, int], known: dict[Stream, int]) -> None:
    for stream, clock in known.items():
        into[stream] = max(into[stream], clock)


def _current() -> int:
    return torch.cuda.current_stream().cuda_stream


_followed: list[Streams] = []
"""torch's callbacks cannot be removed, so one set of them serves all ranks that a process runs, one after the other."""


def _follow(streams: Streams) -> None:
    if not _followed:
        torch._C._activate_gpu_trace()
        _gpu_trace.register_callback_for_event_record(lambda event, stream: _followed[0].recorded(event, stream))
        _gpu_trace.register_callback_for_event_wait(lambda event, stream: _followed[0].waits(event, stream))
        _gpu_trace.register_callback_for_event_synchronization(lambda event: _followed[0].host_waits())
        _gpu_trace.register_callback_for_stream_synchronization(lambda stream: _followed[0].host_waits())
        _gpu_trace.register_callback_for_device_synchronization(lambda: _followed[0].host_waits())
    _followed[:] = [streams]
