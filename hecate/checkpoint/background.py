"""Checkpoints written while training goes on: from a copy, in a thread, over a separate process group.

The interpreter waits for the thread at exit, and `destroy_process_group` does not disturb it. If a checkpoint could
not be written and `wait` was never called on its handle, the process exits with an error.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from hecate.checkpoint.folder import resolved
from hecate.checkpoint.state import TrainingState
from hecate.checkpoint.store import check_ranks, collect, write
from hecate.ranks.agree import PrivateRanks, Ranks
from hecate.runtime.comms import destroy

__all__ = ["SaveHandle", "Saves"]


class SaveHandle:
    """A checkpoint that is being written.

    Attributes:
        path: folder of the checkpoint.
        waited: whether `wait` was called; it must be called on all ranks or on none.
    """

    def __init__(self, path: Path, future: Future[None]) -> None:
        self.path, self.waited = path, False
        self._future = future
        _unseen.add(self)
        future.add_done_callback(lambda future: None if future.exception() else _unseen.discard(self))

    def done(self) -> bool:
        """Whether `wait` would return (or raise) immediately on this rank."""
        return self._future.done()

    def failed(self) -> bool:
        """Whether `wait` would raise immediately on this rank; the other ranks follow shortly after."""
        return self._future.done() and self._future.exception() is not None

    def wait(self) -> None:
        """Return when the checkpoint is in place. OSError on all ranks if it could not be written."""
        self.waited = True
        try:
            self._future.result()
        finally:
            if self._future.done():  # otherwise Ctrl-C interrupted the wait
                _unseen.discard(self)

    def problem(self) -> str:
        """Error message for a caller that did not call `wait`."""
        why = repr(self._future.exception()) if self._future.done() else "the process ended before it was written"
        return f"checkpoint {self.path} is not in place, the one before is kept: {why}"


_unseen: set[SaveHandle] = set()
"""Handles whose checkpoint is unfinished, or failed without `wait` having raised the error."""
os.register_at_fork(after_in_child=_unseen.clear)


@atexit.register
def _report() -> None:
    """Report unnoticed failures at exit. Python has joined all threads by now; only os._exit can change the status."""
    if not _unseen:
        return
    for handle in _unseen:
        print(f"hecate: {handle.problem()}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Saves:
    """Writes the checkpoints of one model, at most one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hecate-save")
        self._ranks: PrivateRanks | None = None
        self._count = 0
        self._pending: SaveHandle | None = None

    def save(
        self,
        path: Path,
        state: TrainingState,
        optimizer: Optimizer | None,
        async_op: bool,
        extra: Mapping[str, Any] | None,
        sha256: bool,
    ) -> SaveHandle | None:
        """See `FSSDP.save`."""
        self.finish()
        path = resolved(path)
        contents = collect(path, state, optimizer, extra or {}, copy=async_op)
        ranks = self._next(path, state)
        if not async_op:
            write(path, contents, ranks, in_thread=False, sha256=sha256)
            return None
        task = partial(write, path, contents, ranks, in_thread=True, sha256=sha256)
        self._pending = SaveHandle(path, self._thread.submit(task))
        return self._pending

    def finish(self) -> None:
        """Wait for the checkpoint being written, if any; raises its error unless `SaveHandle.wait` was called."""
        pending, self._pending = self._pending, None
        if pending is not None and not pending.waited:
            pending.wait()

    def close(self) -> None:
        """Wait for the checkpoint being written, if any, then end the thread and destroy the process group."""
        self._thread.shutdown(wait=True)
        if self._ranks is not None and self._ranks.group is not None:
            destroy(self._ranks.group)
        self._ranks = None

    def _next(self, path: Path, state: TrainingState) -> PrivateRanks:
        """The ranks that write the next checkpoint, numbered so that its messages are told apart from earlier ones."""
        if self._ranks is None:
            check_ranks(f"FSSDP.save({str(path)!r})", state, Ranks.current())
            self._ranks = PrivateRanks.make()
        self._count += 1
        return replace(self._ranks, task=self._count)
