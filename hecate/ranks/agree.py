"""Raises an error of one rank on all ranks, so that the others do not hang."""

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
    """The ranks of a process group, as they were when this object was made.

    If the process group is destroyed later, messages fail; a rank never behaves as if it were the only one.

    Attributes:
        rank, size: this rank and the number of ranks; (0, 1) without a process group.
        group: process group of all ranks; None without one.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def current(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """The ranks of `group` (None: of the default process group)."""
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
        """Return `function()`; if it raises on any rank, all ranks raise the error of the lowest such rank. Collective.

        That rank raises its exception itself. The others raise one of the same class and text or, if the exception
        cannot be pickled, a RuntimeError that names the rank, class and text.
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
        """Call `function` on rank 0 only; returns its result there, None elsewhere."""
        return function() if self.rank == 0 else None


@dataclass(frozen=True)
class PrivateRanks(Ranks):
    """All ranks over a separate gloo group, for a thread whose messages must not mix with those of training.

    Messages still work after `destroy_process_group`: it empties the registry in which functions of torch.distributed
    look up groups, so this class calls the methods of the group object itself.

    Attributes:
        task: number of the task that the ranks are working on, sent with every message. If a rank has left a task
            halfway (by Ctrl-C, for example) and begins the next one, the others raise an error instead of taking its
            messages for those of the present task.
    """

    task: int = 0

    @classmethod
    def make(cls) -> PrivateRanks:
        """Make the group, over all ranks of the default process group. Collective."""
        if not dist.is_initialized():
            return cls(0, 1, None)
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def gather(self, value: T) -> list[T]:
        """What every rank passes, by rank. Collective."""
        return self.from_rank_0([self.to_rank_0(value)] * self.size)

    def to_rank_0(self, value: T) -> list[T]:
        """Send `value` to rank 0; returns the values of all ranks there, an empty list elsewhere. Collective."""
        if self.rank != 0:
            self._send(value, 0)
            return []
        return [value, *(self._receive(rank) for rank in range(1, self.size))]

    def from_rank_0(self, values: Sequence[T]) -> T:
        """Send one value to each rank; returns this rank's. Only rank 0's `values` are used. Collective."""
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
    """Rank of this process and number of ranks in the default process group; (0, 1) without one."""
    ranks = Ranks.current()
    return ranks.rank, ranks.size


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank passes, by rank. Collective over `group` (None: the default process group)."""
    return Ranks.current(group).gather(value)


def agree(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`Ranks.agree` over `group` (None: the default process group). Collective."""
    return Ranks.current(group).agree(function)


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0 only; returns its result there, None elsewhere."""
    return Ranks.current().on_rank_0(function)
