"""Finds missing ranks: every rank increments a counter in the job's store, and they are read when a collective fails.

A backend only knows that a connection broke or timed out. With many ranks, the connection may have been to a rank that
is alive and only gave up earlier. A rank whose counter no longer increases is the one that died or hangs.

Over NCCL nothing raises: the host blocks until NCCL's watchdog ends the process. `hecate.ranks.watch` looks meanwhile.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from hecate.errors import MissingRankError
from hecate.ranks.stuck import Inside
from hecate.ranks.watch import watch

__all__ = ["Heartbeat"]

PATIENCE = 5
"""Intervals without a beat after which a rank counts as missing; on a busy machine one or two beats may be late."""

UNEQUAL_CALLS = (
    "All ranks are alive, so they have called the model or an MoE layer of it unequally often, in other modes (with "
    "and without gradients), or have other parameters frozen. generate() of unequal lengths needs synced_gpus=True."
)
"""Added to a time-out error if no rank is missing."""

CONNECTION_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out")
"""Parts of backends' error messages that mean that a peer is gone."""


class Heartbeat:
    """Increments this rank's counter from a thread until `stop()` is called, or the object or the process ends.

    A second thread watches other ranks (`hecate.ranks.watch`).

    One process may have several heartbeats (one per engine); the rank has left when all of them have stopped.

    Args:
        store: store that all ranks share. It is kept by rank 0, so if it is gone, rank 0 is missing.
        rank, world_size: this rank and the number of ranks.
        interval: time between beats.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, interval: timedelta = timedelta(seconds=1)
    ) -> None:
        # Use a separate connection: on a shared one, a blocking call of the main thread would delay the beats.
        self._store = dist.PrefixStore("hecate/heartbeat", store.clone())  # type: ignore[attr-defined]  # stubs lack it
        self._rank, self._world_size, self._interval = rank, world_size, interval
        self._stop = threading.Event()
        self._store.add(f"{rank}/alive", 1)
        # The thread must not keep this object alive, so that `stop` runs when the last user drops it.
        seconds = interval.total_seconds()
        beat = partial(_beat, self._store, str(rank), seconds, self._stop)
        self._inside = Inside()
        look = partial(watch, self._store, rank, world_size, seconds, self._stop, self._inside)
        threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for run, name in ((beat, "hecate-heartbeat"), (look, "hecate-watch"))[: min(world_size, 2)]
        ]
        for thread in threads:
            thread.start()
        self.stop = weakref.finalize(self, _leave, self._store, rank, self._stop, threads)

    def missing(self) -> list[int]:
        """Ranks that have not left but made no beat during `PATIENCE` intervals; rank 0 if its store is gone."""
        suspects = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            before = self._read("{}", suspects)
            for _ in range(PATIENCE):
                if not suspects:  # usually after one interval: most errors have another reason than a missing rank
                    break
                time.sleep(self._interval.total_seconds())
                now, alive = self._read("{}", suspects), self._read("{}/alive", suspects)
                suspects = [rank for rank in suspects if now[rank] == before[rank] and alive[rank]]
        except (RuntimeError, OSError):  # torch's store errors
            return [0]
        return suspects

    @contextmanager
    def naming_missing_ranks(self, exit_code: int | None = None) -> Iterator[None]:
        """Context that turns a RuntimeError into `MissingRankError` if a rank is missing, and else passes it on.

        Args:
            exit_code: if a rank is missing and this process is stuck in the context, where nothing will raise (NCCL),
                it names the rank and ends with this code; None: it only names it.
        """
        try:
            with self._inside.entered(exit_code):
                yield
        except (MissingRankError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            if (missing := self._blamed_for(error)) is not None:
                raise missing from error
            if "timed out" in str(error).lower() and UNEQUAL_CALLS not in getattr(error, "__notes__", ()):
                error.add_note(UNEQUAL_CALLS)
            raise

    def _blamed_for(self, error: RuntimeError) -> MissingRankError | None:
        """The error that names the ranks whose end explains `error`; None if there are none."""
        left = self._left() if _lost_connection(error) else {}
        # A rank that ended by MissingRankError is not the first cause: it missed another rank itself. A rank that
        # ended without an exception may be a consequence too, so it is blamed only if there is no better answer.
        first = {rank: why for rank, why in left.items() if MissingRankError.__name__ not in why}
        if any(first.values()):
            return _ended(first)
        if ranks := self.missing():
            return MissingRankError(ranks, PATIENCE * self._interval)
        return _ended(first or left) if left else None

    def _left(self) -> dict[int, str]:
        """Ranks that have left, each with its last uncaught exception as text, "" if there was none."""
        try:
            alive = self._read("{}/alive", range(self._world_size))
            left = [rank for rank in alive if rank != self._rank and not alive[rank]]
            keys = {rank: f"{rank}/why" for rank in left}
            return {rank: self._store.get(k).decode() if self._store.check([k]) else "" for rank, k in keys.items()}
        except (RuntimeError, OSError):  # the store is gone; `missing` reports that
            return {}

    def _read(self, key: str, ranks: Iterable[int]) -> dict[int, int]:
        # `add(key, 0)` reads a counter; unlike `get`, it does not wait until the key exists.
        return {rank: self._store.add(key.format(rank), 0) for rank in ranks}


def _beat(store: dist.Store, rank: str, interval: float, stop: threading.Event) -> None:
    while not stop.wait(interval):
        try:
            store.add(rank, 1)
        except (RuntimeError, OSError):  # the store is gone; `missing` of other ranks reports that
            return


def _leave(store: dist.Store, rank: int, stop: threading.Event, threads: list[threading.Thread]) -> None:
    stop.set()
    for thread in threads:
        if thread is not threading.current_thread():  # the garbage collector may run this in one of them
            thread.join()
    with suppress(RuntimeError, OSError):  # the store may be gone already
        # Python stores the uncaught exception here before it prints it.
        if (error := getattr(sys, "last_value", None)) is not None:
            store.set(f"{rank}/why", "".join(traceback.format_exception_only(type(error), error)).strip())
        store.add(f"{rank}/alive", -1)


def _lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(text in str(error).lower() for text in CONNECTION_LOST)


def _ended(left: dict[int, str]) -> MissingRankError:
    said = (f"rank {rank} ended" + (f", last uncaught exception: {why}" if why else "") for rank, why in left.items())
    return MissingRankError(list(left), timedelta(0), "; ".join(said))
