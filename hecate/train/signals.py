"""Being asked to stop: by Ctrl-C (SIGINT), by SIGTERM, which schedulers send before they kill, or by SIGUSR1, which
SLURM sends on request.

While a run trains, the first signal is only noted, so that a step is never broken off; ranks agree on the step to stop
after (`loop.Trainer`). Before that there is nothing to save. A second Ctrl-C ends the process where it is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

__all__ = [
    "CTRL_C_EXIT_CODE",
    "Forwarder",
    "StopRequest",
    "exit_code",
    "forwarding",
    "launches",
    "listening",
    "sigint_blocked",
]

CTRL_C_EXIT_CODE = 128 + signal.SIGINT
"""What a shell reports of a program that SIGINT ended."""
PASSED_ON = signal.SIGUSR2
"""Ctrl-C as the parent passes it on: a terminal sends SIGINT to it and to its children, who must count it once."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, PASSED_ON)


def exit_code(number: signal.Signals, requeue_exit_code: int) -> int:
    """What a run that `number` asked to stop ends with: who presses Ctrl-C wants no requeue."""
    return CTRL_C_EXIT_CODE if number == signal.SIGINT else requeue_exit_code


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: by which one; SIGINT if that is among several.
        deferred: whether somebody looks at `signal` from now on; until then a signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.deferred = False
        self._interrupted = False  # by a SIGINT of its own

    def note(self, number: int) -> bool:
        """Whether the process has to end at once."""
        # torchrun passes the first Ctrl-C on as SIGINT and the second as SIGTERM. Spawned processes get SIGINT from the
        # kernel if their parent dies, once for each of its threads.
        if self._interrupted and number in (signal.SIGINT, signal.SIGTERM):
            return True
        self._interrupted |= number == signal.SIGINT
        if self.signal != signal.SIGINT:
            self.signal = signal.SIGINT if number == PASSED_ON else signal.Signals(number)
        return not self.deferred


@contextmanager
def listening(requeue_exit_code: int) -> Iterator[StopRequest]:
    """Note `SIGNALS`; if the request is not deferred, or with the second Ctrl-C, exit. In the main thread."""
    request = StopRequest()

    def note(number: int) -> None:
        if request.note(number):
            assert request.signal is not None
            code = exit_code(request.signal, requeue_exit_code)
            when = "twice" if request.deferred else "before the first step"
            print(f"{request.signal.name} {when}: exit {code}", file=sys.stderr, flush=True)
            os._exit(code)  # an exception might be taken for an error by whoever is collecting them

    with _handling(note):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `sigint_blocked`
        yield request


class Forwarder:
    """Passes signals on: a scheduler, or `kill`, may know the parent of the processes only.

    Attributes:
        signal: the latest one, but for SIGINT, which stays.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._processes: list[int] = []
        self._lock = threading.Lock()

    @property
    def sent(self) -> signal.Signals | None:
        """What the processes get for `signal`."""
        return PASSED_ON if self.signal == signal.SIGINT else self.signal

    def to(self, processes: list[int]) -> None:
        """To the processes with these ids, also what came before."""
        with self._lock:
            self._processes = processes
            if self.sent is not None:
                self._send(self.sent)

    def note(self, number: int) -> None:
        """Pass it on; a second Ctrl-C ends all processes, this one too."""
        with self._lock:
            if self._processes and self.signal == signal.SIGINT and number == signal.SIGINT:
                self._send(signal.SIGKILL)
                os._exit(CTRL_C_EXIT_CODE)
            if self.signal != signal.SIGINT:
                self.signal = signal.Signals(number)
            assert self.sent is not None
            self._send(self.sent)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process, number)


@contextmanager
def forwarding() -> Iterator[Forwarder]:
    """Pass `SIGNALS` on. In the main thread, before the processes are started."""
    forwarder = Forwarder()
    with _handling(forwarder.note):
        yield forwarder


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Processes that are started inside begin without SIGINT, which a terminal sends to them too.

    One that comes while they still import waits for `listening`, instead of showing where in the imports they were.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    """Call `act` with each of `SIGNALS` that comes.

    In a thread: Python's handlers run in the main one, which may be waiting in a collective whose end never comes.
    """
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    thread = threading.Thread(target=_act_on, args=(receiving, act), name="hecate-signals", daemon=True)
    thread.start()
    before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(sending)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, previous in before.items():
            signal.signal(number, previous)
        os.write(sending, b"\0")
        thread.join()
        os.close(sending)
        os.close(receiving)


def _act_on(receiving: int, act: Callable[[int], None]) -> None:
    """Until a 0, which is no signal."""
    while number := os.read(receiving, 1)[0]:
        if number in SIGNALS:  # others may have handlers too
            act(number)
