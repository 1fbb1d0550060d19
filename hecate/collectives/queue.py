"""One queue per process group: messages of two ranks match in starting order, which must be equal on all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any
from weakref import finalize

from hecate.collectives.transport import Work

__all__ = ["HostQueue"]


class HostQueue:
    """A thread that runs collectives in the order they were started in; one for all transports of a process group.

    Args:
        executor: where they run; None makes a thread.
    """

    def __init__(self, executor: Executor | None = None) -> None:
        self._executor = _DaemonThread() if executor is None else executor
        self._last: Future[None] | None = None
        self._failure: str | None = None
        self._closed = False

    @property
    def idle(self) -> bool:
        """Whether everything that was started has ended, so that a new task need not be queued. False once closed."""
        return not self._closed and (self._last is None or self._last.done())

    def start(self, run: Callable[[], None]) -> Work:
        """Run `run` behind everything that was started before.

        Raises:
            RuntimeError: the queue was closed. From `Work.wait()`: a collective before this one failed.
        """
        if self._closed:
            raise RuntimeError("Transport: closed; it carries nothing more")
        alone = self.idle
        mine = self._last = self._executor.submit(self._run, run)

        def finish() -> None:
            # If nothing is queued before it, run it on the waiting thread: saves two thread switches.
            if alone and self._last is mine and mine.cancel():
                self._run(run)
            else:
                mine.result()

        return Work(finish)

    def close(self) -> None:
        """Wait for what was started and end the thread; `start` raises from now on."""
        self._closed = True
        self._executor.shutdown(wait=True)

    def _run(self, run: Callable[[], None]) -> None:
        """Run `run`; after a failure everything queued fails at once, instead of one timeout after the other."""
        if self._failure is not None:
            raise RuntimeError(f"Transport: a collective before this one failed: {self._failure}")
        try:
            run()
        except Exception as error:
            self._failure = str(error)  # not the exception, which would keep the rows alive
            raise


class _DaemonThread(Executor):
    """One thread, started when first needed. It ends with this object, and does not keep the interpreter alive.

    A `ThreadPoolExecutor` is joined at exit: there a failed process and its peers would wait for each other until the
    process group's timeout.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if self._thread is None:
            # The thread holds the tasks only, so that this object can go.
            self._thread = threading.Thread(target=_work, args=(self._tasks,), name="hecate-collectives", daemon=True)
            self._thread.start()
            finalize(self, self._tasks.put, None)
        future: Future = Future()
        self._tasks.put((future, lambda: function(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._thread is not None:
            self._tasks.put(None)
            if wait and self._thread is not threading.current_thread():
                self._thread.join()


def _work(tasks: SimpleQueue[tuple[Future, Callable[[], Any]] | None]) -> None:
    """Run tasks until None comes."""
    while (task := tasks.get()) is not None:
        _run(*task)
        del task  # an idle thread must not hold rows


def _run(future: Future, function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
