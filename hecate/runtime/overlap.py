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
    """Seconds that compute waited, per layer; on CUDA read from events only when asked."""

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

    def take(self) -> dict[int, float]:
        """Seconds per layer since the last call. Waits for the device where events were recorded."""
        for layer, before, after in self._events:
            after.synchronize()
            self._add(layer, before.elapsed_time(after) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _add(self, layer: int, seconds: float) -> None:
        self._seconds[layer] = self._seconds.get(layer, 0.0) + seconds


class Pending:
    """Communication under way on a lane."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait: Callable[[], None] | None = wait

    def wait(self) -> None:
        """Return when compute may use the results; further calls do nothing."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()


class Lane:
    """One kind of traffic (expert copies, gradients), in issue order."""

    def __init__(self, device: torch.device, exposed: ExposedTime) -> None:
        self.on_cuda = device.type == "cuda"
        self._exposed = exposed
        self._stream = torch.cuda.Stream(device) if self.on_cuda else None

    def start(self, layer: int, launch: Callable[[], Work]) -> Pending:
        """Launch after all compute issued so far. What `launch` uses must stay alive and untouched until `wait()`."""
        if self._stream is None:
            work = launch()
            return Pending(lambda: self._exposed.wait(layer, work.wait, on_cuda=False))
        self._stream.wait_stream(torch.cuda.current_stream())
        with self._current():
            launch().wait()
            done = torch.cuda.Event()
            done.record()
        return Pending(
            lambda: self._exposed.wait(layer, lambda: torch.cuda.current_stream().wait_event(done), on_cuda=True)
        )

    def _current(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
