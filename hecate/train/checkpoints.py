"""The checkpoints of a run: written in the background, found by their content; only the newest are kept."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.optim import Optimizer

from hecate.api import FSSDP
from hecate.checkpoint.background import SaveHandle
from hecate.checkpoint.history import checkpoints, latest, prune
from hecate.ranks.agree import agree, gather, on_rank_0

__all__ = ["Checkpoints", "Position"]


@dataclass(frozen=True)
class Position:
    """Progress of a run. Data and random numbers depend only on this and the seed.

    Attributes:
        step: number of steps taken or skipped.
        sequences: number of training sequences used by all devices together.
    """

    step: int
    sequences: int


class Checkpoints:
    """Saves and finds a run's checkpoints; all methods except `failed` are collective.

    Args:
        folder: folder that holds only the checkpoints.
        engine, optimizer: saved together with the position.
        keep: number of complete checkpoints to keep.
        background: whether to write from a copy while training goes on.
    """

    def __init__(self, folder: Path, engine: FSSDP, optimizer: Optimizer, keep: int, background: bool) -> None:
        self._folder, self._engine, self._optimizer = folder, engine, optimizer
        self._keep, self._background = keep, background
        self._pending: SaveHandle | None = None
        self._last: Position | None = None

    def resume(self) -> Position | None:
        """Load the newest intact checkpoint; None if there is no checkpoint. ValueError if all are damaged."""
        path = latest(self._folder)
        if path is None:
            agree(self._check_none)
            return None
        extra = self._engine.load(path, self._optimizer)
        if extra.keys() != {"step", "sequences"}:
            raise ValueError(f"checkpoint {path}: has no position in the data; it is not of a run of hecate.train")
        self._last = Position(**extra)
        return self._last

    def save(self, position: Position) -> None:
        """Begin to write a checkpoint; if that fails, now or later, the failure is printed and training goes on."""
        self.finish()
        try:
            self._begin(position, self._background)
        except OSError as error:
            self._report(position, error)

    def save_now(self, position: Position) -> None:
        """Return when the checkpoint of `position` is in place. OSError if it cannot be written."""
        self.finish()
        try:
            if self._last != position:
                self._begin(position, background=False)
        except OSError as error:
            raise OSError(f"{error}{self._needed(error)}") from error

    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint being written has failed; not collective."""
        return self._pending is not None and self._pending.failed()

    def finish(self) -> None:
        """Wait for the checkpoint being written, if any; print an error if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.wait()
        except OSError as error:
            assert self._last is not None
            self._report(self._last, error)
            self._last = None
        else:
            self._prune()

    def _begin(self, position: Position, background: bool) -> None:
        path = self._folder / f"step-{position.step:08d}"
        self._pending = self._engine.save(path, self._optimizer, async_op=background, extra=asdict(position))
        self._last = position
        if self._pending is None:
            self._prune()

    def _prune(self) -> None:
        """Delete old checkpoints. A failure is only printed: the next call tries again."""
        try:
            prune(self._folder, self._keep)
        except OSError as error:
            text = f"old checkpoints could not be deleted: {error}"
            on_rank_0(lambda: print(text, file=sys.stderr, flush=True))

    def _check_none(self) -> None:
        damaged = sorted(path.name for path in checkpoints(self._folder))
        if damaged:
            raise ValueError(
                f"{self._folder}: all checkpoints are damaged ({', '.join(damaged)}); overwrite=true drops them and "
                "starts the run again"
            )

    def _report(self, position: Position, error: OSError) -> None:
        text = (
            f"checkpoint of step {position.step} could not be written, the one before is kept: {error}"
            f"{self._needed(error)}; the next one is tried when it is due"
        )
        on_rank_0(lambda: print(text, file=sys.stderr, flush=True))

    def _needed(self, error: OSError) -> str:
        """If the disk is full, how much a checkpoint takes. Collective: all ranks have the error."""
        if os.strerror(errno.ENOSPC) not in str(error):
            return ""
        memory = self._engine.stats()["memory_bytes"]
        size = sum(gather(memory["owned"] + memory["optimizer"]))
        return f"; a checkpoint of this run takes about {size / 2**20:,.1f} MiB"
