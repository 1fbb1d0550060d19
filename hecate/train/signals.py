"""Being asked to stop: SIGTERM, which schedulers send before they kill, and SIGUSR1, which SLURM sends on request.

While a run trains, a handler only takes note, so that a step is never broken off; ranks agree on the step to stop after
(`loop.Trainer`). Before that there is nothing to save.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Forwarder", "StopRequest", "forwarding", "launches", "listening"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: by which one.
        deferred: whether somebody looks at `signal` from now on; until then a signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.deferred = False


@contextmanager
def listening(exit_code: int) -> Iterator[StopRequest]:
    """Note `SIGNALS` where the request is deferred, else exit with `exit_code`. In the main thread."""
    request = StopRequest()

    def note(number: int) -> None:
        request.signal = signal.Signals(number)
        if not request.deferred:
            print(f"{request.signal.name} before the first step: exit {exit_code}", file=sys.stderr, flush=True)
            os._exit(exit_code)  # an exception might be taken for an error by whoever is collecting them

    with _handling(note):
        yield request


class Forwarder:
    """Passes signals on: a scheduler may know the parent of the processes only.

    Attributes:
        signal: the latest one.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._processes: list[int] = []

    def to(self, processes: list[int]) -> None:
        """To the processes with these ids, also what came before."""
        self._processes = processes
        if self.signal is not None:
            self._send(self.signal)

    def _send(self, number: int) -> None:
        self.signal = signal.Signals(number)
        for process in self._processes:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process, number)


@contextmanager
def forwarding() -> Iterator[Forwarder]:
    """Pass `SIGNALS` on. In the main thread, before the processes are started."""
    forwarder = Forwarder()
    with _handling(forwarder._send):
        yield forwarder


def launches(torchrun: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """What started this process -> whether it did so before: torchrun restarts its processes, SLURM requeues its job.

    Args:
        torchrun: a name of its launch that no other has; None without it.
        environment: of the process.
    """
    found = {}
    for launcher, name, count in (
        ("torchrun", torchrun, "TORCHELASTIC_RESTART_COUNT"),
        ("slurm", environment.get("SLURM_JOB_ID"), "SLURM_RESTART_COUNT"),
    ):
        if name:
            found[f"{launcher} {name}"] = int(environment.get(count) or 0) > 0
    return found


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
