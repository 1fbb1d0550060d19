"""An error on one rank becomes an error on all, instead of a hang of the others."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hecate.ranks.raised import Raised

__all__ = ["PrivateRanks", "Ranks", "agree", "gather", "on_rank_0", "rank_and_world"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that act together, as they were when this was made.

    Whatever becomes of the process group later, no rank takes itself for the only one: its messages arrive, or fail.

    Attributes:
        rank, size: of the process group, (0, 1) without one.
        group: of all ranks; None without a process group.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def current(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """Those of `group` (None: of the default process group)."""
        group = dist.group.WORLD if group is None and dist.is_initialized() else group
        return Ranks(0, 1, None) if group is None else Ranks(group.rank(), group.size(), group)

    def gather(self, value: T) -> list[T]:
        """What every rank passes, by rank. Collective."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, function: Callable[[], T]) -> T:
        """`function()`; if it raises on any rank, all raise what the lowest such rank did. Collective.

        On that rank it is the exception itself; elsewhere one of the same class and text, or a RuntimeError that names
        the rank, class and text if the exception cannot be pickled.
        """
        error: Exception | None = None
        try:
            value = function()
        except Exception as raised:
            error = raised
        for rank, there in enumerate(self.gather(None if error is None else Raised.of(error))):
            if there is not None:
                raise error if rank == self.rank and error is not None else there.rebuilt(rank, also=error)
        return value

    def on_rank_0(self, function: Callable[[], T]) -> T | None:
        """`function()` there, None elsewhere."""
        return function() if self.rank == 0 else None


@dataclass(frozen=True)
class PrivateRanks(Ranks):
    """All ranks over a gloo group of their own, for a thread whose messages must not meet those of training.

    They go on after `destroy_process_group`: the functions of torch.distributed look a group up in a registry, which
    that empties, so the messages go over the group object itself.

    Attributes:
        task: number of what the ranks are doing, sent with every message: a rank that left the task before in its
            middle, by Ctrl-C say, and begins the next one is an error on the others, not an answer to them.
    """

    task: int = 0

    @classmethod
    def make(cls) -> PrivateRanks:
        """Those of the default process group. Collective."""
        if not dist.is_initialized():
            return cls(0, 1, None)
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def gather(self, value: T) -> list[T]:
        """What every rank passes, by rank. Collective."""
        return self.from_rank_0([self.to_rank_0(value)] * self.size)

    def to_rank_0(self, value: T) -> list[T]:
        """What every rank passes, by rank, on rank 0; an empty list elsewhere. Collective."""
        if self.rank != 0:
            self._send(value, 0)
            return []
        return [value, *(self._receive(rank) for rank in range(1, self.size))]

    def from_rank_0(self, values: Sequence[T]) -> T:
        """Rank 0 passes one value a rank; each gets its own. Collective."""
        if self.rank != 0:
            return self._receive(0)
        for rank in range(1, self.size):
            self._send(values[rank], rank)
        return values[0]

    def _send(self, value: Any, rank: int) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps((self.task, value))), dtype=torch.uint8)
        assert self.group is not None
        self.group.send([torch.tensor([len(data)])], rank, 0).wait()
        self.group.send([data], rank, 0).wait()

    def _receive(self, rank: int) -> Any:
        length = torch.empty(1, dtype=torch.int64)
        assert self.group is not None
        self.group.recv([length], rank, 0).wait()
        data = torch.empty(int(length), dtype=torch.uint8)
        self.group.recv([data], rank, 0).wait()
        task, value = pickle.loads(data.numpy().tobytes())
        if task != self.task:
            raise RuntimeError(f"rank {self.rank} is at task {self.task}, rank {rank} at {task}: one left it halfway")
        return value


def rank_and_world() -> tuple[int, int]:
    """Of the default process group; (0, 1) without one."""
    ranks = Ranks.current()
    return ranks.rank, ranks.size


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank passes, by rank. Collective over `group` of all ranks (None: the default one)."""
    return Ranks.current(group).gather(value)


def agree(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """As `Ranks.agree`, over `group` (None: the default one). Collective."""
    return Ranks.current(group).agree(function)


def on_rank_0(function: Callable[[], Any]) -> Any:
    """`function()` there, None elsewhere."""
    return Ranks.current().on_rank_0(function)
