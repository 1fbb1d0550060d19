"""Being asked to stop: SIGTERM, which schedulers send before they kill, and SIGUSR1, which SLURM sends on request.

A handler only takes note, so that a step is never broken off; ranks agree on the step to stop after (`loop.Trainer`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["StopRequest", "forwarding", "listening", "was_restarted"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


class StopRequest:
    """Whether this process was asked to stop; `signal` says by which one."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Take note of `SIGNALS` instead of dying of them. In the main thread."""
    request = StopRequest()

    def note(number: int) -> None:
        request.signal = signal.Signals(number)

    with _handling(note):
        yield request


@contextmanager
def forwarding(processes: Callable[[], list[int]]) -> Iterator[None]:
    """Pass `SIGNALS` on to the processes with these ids: a scheduler may know their parent only."""

    def forward(number: int) -> None:
        for process in processes():
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process, number)

    with _handling(forward):
        yield


def was_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has restarted the processes of this launch, or SLURM requeued its job."""
    return any(int(environment.get(name) or 0) for name in RESTART_COUNTS)


@contextmanager
def _handling(act: Callable[[int], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        act(number)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
