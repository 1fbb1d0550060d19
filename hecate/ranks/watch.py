"""Watches that other ranks are alive while this one may be blocked in a collective that never raises, as NCCL's.

Each rank looks at the counter of one other, the next by number that has not left, and at one key where a missing rank
is announced: three messages to the store per rank and interval (with its own beat), whatever the world size. A rank
that finds its neighbour's counter standing still reads the counters of all ranks, once, and announces those that stand
still.

What is no alarm: a rank that left in good order; one that is slow but whose heartbeat thread runs, as in a debugger, in
a compiler or behind a GPU; and a pause of this process, because its own looks are counted, not seconds.

A rank that keeps the store in its own process and is stopped as a whole is not found: looks then wait for the store.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from hecate.errors import MissingRankError
from hecate.ranks.stuck import Inside

__all__ = ["LOOKS", "watch"]

logger = logging.getLogger(__name__)

LOOKS = 20
"""Looks, one per interval, at which a counter stands still until its rank is announced; and looks at which this process
does not move until it ends. Native code may hold Python's lock, and so the heartbeat, for some seconds."""

ANNOUNCED = "missing"


def watch(
    store: dist.Store, rank: int, world_size: int, interval: float, stop: threading.Event, inside: Inside
) -> None:
    """Look at one other rank and at announcements until `stop` is set. Runs in a thread of its own.

    A missing rank is written to the log (and to stderr, if the log goes elsewhere) on every rank. If this process is
    then stuck inside a block that has an exit code, it ends with that.

    Args:
        store: store with the counters of `hecate.ranks.heartbeat`.
        rank: this rank.
        world_size: number of ranks.
        interval: seconds between looks.
        stop: ends the watch.
        inside: where this process may be stuck.
    """
    watcher = _Watcher(store, rank, world_size, interval)
    while not stop.wait(interval):
        stuck = inside.look()
        try:
            missing = watcher.look(stop)
        except (RuntimeError, OSError):  # torch's store errors
            # Rank 0 keeps the store. It may have ended in good order, so only who is stuck takes it for missing.
            missing = MissingRankError([0], timedelta(0), "the job's store is gone") if stuck >= LOOKS else None
        if missing is None or stop.is_set():
            continue
        watcher.say(str(missing))
        if stuck >= LOOKS and inside.exit_code is not None:
            _end(rank, missing, inside)


@dataclass
class _Watcher:
    store: dist.Store
    rank: int
    world_size: int
    interval: float
    said: set[str] = field(default_factory=set)
    watched: int = field(init=False)
    beats: int = -1
    still: int = 0  # looks at which the counter of the watched rank stood still

    def __post_init__(self) -> None:
        self.watched = (self.rank + 1) % self.world_size

    def look(self, stop: threading.Event) -> MissingRankError | None:
        """One look; returns who is missing, if it is known. A rank that beats again is not missing any more."""
        beats = self.store.add(str(self.watched), 0)
        self.still = self.still + 1 if beats == self.beats else 0
        self.beats = beats
        if self.still == LOOKS:
            self._suspect(stop)
        return self._announced()

    def _suspect(self, stop: threading.Event) -> None:
        """The watched rank does not beat: announce it, or go on to the next if it has left in good order."""
        if self.store.add(f"{self.watched}/alive", 0):
            self._announce(self._all_missing(stop))
        elif why := self._why(self.watched):
            self._announce([self.watched], f"it ended, last uncaught exception: {why}")
        else:
            others = [(self.watched + i) % self.world_size for i in (1, 2)]
            self.watched = others[0] if others[0] != self.rank else others[1]
        self.beats, self.still = -1, 0

    def _why(self, rank: int) -> str:
        """The exception that a rank ended with, unless that was about another missing rank; "" if none."""
        why = self.store.get(f"{rank}/why").decode() if self.store.check([f"{rank}/why"]) else ""
        return "" if MissingRankError.__name__ in why else why

    def _all_missing(self, stop: threading.Event) -> list[int]:
        """All ranks whose counters stand still now, among them the watched one unless it beats again."""
        before = self._read("{}")
        stop.wait(LOOKS * self.interval / 2)  # the heartbeat runs in a thread of its own
        now, alive = self._read("{}"), self._read("{}/alive")
        found = [r for r in range(self.world_size) if r != self.rank and now[r] == before[r] and alive[r]]
        return [] if stop.is_set() else found

    def _announce(self, ranks: list[int], why: str = "") -> None:
        if ranks:
            named = ",".join(map(str, ranks))
            self.store.set(ANNOUNCED, f"{named}|{self.store.add(str(ranks[0]), 0)}|{why}")

    def _announced(self) -> MissingRankError | None:
        if not self.store.check([ANNOUNCED]):
            return None
        named, beats, why = self.store.get(ANNOUNCED).decode().split("|", 2)
        ranks = [int(rank) for rank in named.split(",")]
        if self.rank in ranks or self.store.add(str(ranks[0]), 0) != int(beats):
            return None
        return MissingRankError(ranks, timedelta(seconds=LOOKS * self.interval), why or None)

    def _read(self, key: str) -> list[int]:
        return [self.store.add(key.format(rank), 0) for rank in range(self.world_size)]

    def say(self, text: str) -> None:
        """Write to the log, once."""
        if text in self.said:
            return
        self.said.add(text)
        logger.error("rank %d: %s", self.rank, text)
        if logger.hasHandlers():  # without any, logging itself writes to stderr
            print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)


def _end(rank: int, missing: MissingRankError, inside: Inside) -> None:
    """End the process: no exception reaches a thread that is blocked in a collective."""
    text = f"rank {rank}: {missing}; stuck in {inside.where()}, nothing will raise: exit {inside.exit_code}"
    print(text, file=sys.stderr, flush=True)
    logging.shutdown()
    assert inside.exit_code is not None
    os._exit(inside.exit_code)
