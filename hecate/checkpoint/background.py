"""Checkpoints written while training goes on: from a copy, in a thread, over a process group of its own."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from hecate.checkpoint.folder import resolved
from hecate.checkpoint.state import TrainingState
from hecate.checkpoint.store import collect, write

__all__ = ["SaveHandle", "Saves"]


class SaveHandle:
    """A checkpoint that is being written.

    Attributes:
        waited: whether `wait` was called, which is to be on all ranks or on none.
    """

    def __init__(self, future: Future[None]) -> None:
        self._future = future
        self.waited = False

    def done(self) -> bool:
        """Whether `wait` returns at once, on this rank."""
        return self._future.done()

    def failed(self) -> bool:
        """Whether `wait` raises at once, on this rank; it then does so soon on the others."""
        return self._future.done() and self._future.exception() is not None

    def wait(self) -> None:
        """Return when the checkpoint is in place. OSError where it could not be written, on all ranks."""
        self.waited = True
        self._future.result()


class Saves:
    """The checkpoints of one model, one after another."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hecate-save")
        self._group: dist.ProcessGroup | None = None
        self._pending: SaveHandle | None = None

    def save(
        self,
        path: Path,
        state: TrainingState,
        optimizer: Optimizer | None,
        async_op: bool,
        extra: Mapping[str, Any] | None,
    ) -> SaveHandle | None:
        """See `FSSDP.save`."""
        self.finish()
        path = resolved(path)
        contents = collect(path, state, optimizer, extra or {}, copy=async_op)
        if not async_op:
            write(path, contents, None, in_thread=False)
            return None
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # the thread's collectives must not meet those of training
        self._pending = SaveHandle(self._thread.submit(partial(write, path, contents, self._group, in_thread=True)))
        return self._pending

    def finish(self) -> None:
        """Wait for a checkpoint that is being written; raises what went wrong, unless its handle has done so."""
        pending, self._pending = self._pending, None
        if pending is not None and not pending.waited:
            pending.wait()
