"""One group's collectives on the host take turns: messages between two ranks match in the order they are started in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch.distributed as dist

from hecate.collectives.transport import Work

__all__ = ["Turns"]


class Turns:
    """A thread that runs what it is given, one after the other. One for all transports of a process group.

    Args:
        thread: in place of a thread of its own, for tests.
    """

    def __init__(self, thread: Executor | None = None) -> None:
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="hecate-collectives")
        self._last: Future[None] | None = None
        self._failure: str | None = None

    @staticmethod
    def of(group: dist.ProcessGroup) -> Turns:
        """Those of `group`."""
        return _OF_GROUP.setdefault(group, Turns())

    @property
    def idle(self) -> bool:
        """Whether all it was given is done: what starts now overtakes nothing."""
        return self._last is None or self._last.done()

    def start(self, run: Callable[[], None]) -> Work:
        """`run` behind what was started before; RuntimeError from `wait()` where one of those failed."""
        alone = self.idle
        mine = self._last = self._thread.submit(self._run, run)

        def finish() -> None:
            # Who waits at once does it himself: that spares two hand-overs. Nothing queued may be overtaken.
            if alone and self._last is mine and mine.cancel():
                self._run(run)
            else:
                mine.result()

        return Work(finish)

    def _run(self, run: Callable[[], None]) -> None:
        """`run`, unless one before it failed: what is queued then fails at once, not one timeout after the other."""
        if self._failure is not None:
            raise RuntimeError(f"Routed: a collective before this one failed: {self._failure}")
        try:
            run()
        except Exception as error:
            self._failure = str(error)  # not the error, which holds the rows
            raise


_OF_GROUP: WeakKeyDictionary[dist.ProcessGroup, Turns] = WeakKeyDictionary()
