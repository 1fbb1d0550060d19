"""Requests to stop: Ctrl-C (SIGINT), SIGTERM, which schedulers send before they kill a job, or SIGUSR1, which SLURM
sends on request.

During training the first signal is only recorded, so that no step is interrupted; the ranks agree on the step to stop
after (`loop.Trainer`). Before training there is nothing to save, and a signal ends the process at once. So does a
second Ctrl-C at any time.
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
"""The exit status that shells report for a program ended by SIGINT."""
PASSED_ON = signal.SIGUSR2
"""The parent forwards Ctrl-C as this signal: a terminal sends SIGINT to the children too, which must count it once."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, PASSED_ON)


def exit_code(number: signal.Signals, requeue_exit_code: int) -> int:
    """Exit code of a run stopped by signal `number`; after Ctrl-C it must not be requeued."""
    return CTRL_C_EXIT_CODE if number == signal.SIGINT else requeue_exit_code


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: the signal received, None if none; of several, SIGINT if it is among them, else the latest.
        deferred: set to True once the training loop checks `signal`; before that a signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.deferred = False
        self._interrupted = False  # whether it has received SIGINT itself

    def note(self, number: int) -> bool:
        """Record signal `number`; returns whether the process must end at once."""
        # torchrun forwards the first Ctrl-C as SIGINT and the second as SIGTERM. The kernel sends SIGINT to spawned
        # processes if their parent dies, once for each of its threads.
        if self._interrupted and number in (signal.SIGINT, signal.SIGTERM):
            return True
        self._interrupted |= number == signal.SIGINT
        if self.signal != signal.SIGINT:
            self.signal = signal.SIGINT if number == PASSED_ON else signal.Signals(number)
        return not self.deferred


@contextmanager
def listening(requeue_exit_code: int) -> Iterator[StopRequest]:
    """Record `SIGNALS` during the block; exit if the request is not deferred, and on the second Ctrl-C.

    Call it in the main thread.
    """
    request = StopRequest()

    def note(number: int) -> None:
        if request.note(number):
            assert request.signal is not None
            code = exit_code(request.signal, requeue_exit_code)
            when = "twice" if request.deferred else "before the first step"
            print(f"{request.signal.name} {when}: exit {code}", file=sys.stderr, flush=True)
            os._exit(code)  # an exception could be caught and reported as an error

    with _handling(note):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `sigint_blocked`
        yield request


class Forwarder:
    """Forwards signals from the parent to the spawned processes: a scheduler or `kill` may signal only the parent.

    Attributes:
        signal: the latest signal; once it is SIGINT it stays so.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._processes: list[int] = []
        self._lock = threading.Lock()

    @property
    def sent(self) -> signal.Signals | None:
        """The signal sent to the processes for `signal`."""
        return PASSED_ON if self.signal == signal.SIGINT else self.signal

    def to(self, processes: list[int]) -> None:
        """Set the ids of the processes to forward to; sends them a signal received earlier, if any."""
        with self._lock:
            self._processes = processes
            if self.sent is not None:
                self._send(self.sent)

    def note(self, number: int) -> None:
        """Forward signal `number`; a second Ctrl-C kills all processes and ends this one."""
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
    """Forward `SIGNALS` during the block. Call it in the main thread before the processes are started."""
    forwarder = Forwarder()
    with _handling(forwarder.note):
        yield forwarder


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Block SIGINT in processes started inside the block until they call `listening`.

    A terminal sends SIGINT to them too. If it arrives while they still import modules, it stays pending instead of
    printing a traceback from an import.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def launches(torchrun: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """Name of each launch that started this process -> whether this is a restart (torchrun) or a requeue (SLURM).

    Args:
        torchrun: unique name of the torchrun launch; None without torchrun.
        environment: environment variables of the process.
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
    """During the block, call `act` in a separate thread for each of `SIGNALS` received.

    Python's own handlers run in the main thread, which may be blocked in a collective that never returns.
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
    """Call `act` for each signal number read from the pipe, until a 0, which ends the thread."""
    while number := os.read(receiving, 1)[0]:
        if number in SIGNALS:  # handlers of other signals write here too
            act(number)
