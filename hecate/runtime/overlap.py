"""Where communication runs beside compute, and how long compute waited for it.

On CUDA each lane is a side stream: work is launched and finished there, and `wait()` makes the compute stream wait for
an event, never the host. On CPU the backend's own threads carry it, and `wait()` blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from hecate.collectives.transport import Work

__all__ = ["ExposedTime", "Lane", "Pending"]


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
