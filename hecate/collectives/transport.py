"""What carries chunks between devices: allocation apart from the call, starting apart from waiting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.schedule import Schedule
from hecate.placement import Topology

__all__ = ["Transport", "Work"]

Rows = Mapping[int, Tensor]
"""expert -> one flat contiguous chunk."""


class Work:
    """Communication under way; `wait()` finishes it, once.

    On CUDA `wait()` makes the current stream wait, never the host.
    """

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        """Return when the results may be used on the current stream."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Transport(ABC):
    """Executes schedules over one process group.

    All ranks of the group call the same methods with the same schedules in the same order. A rank passes only the rows
    it takes part with; rows stay untouched by the caller until `wait()`.
    """

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        if topology.num_devices != group.size():
            raise ValueError(
                f"Transport: topology has num_devices={topology.num_devices}, the process group {group.size()} ranks; "
                "they must be equal"
            )
        self._group = ref(group)  # torch holds it until it is destroyed; transports are kept by group
        self.topology = topology
        self._agreed: set[int] = set()

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; RuntimeError once it was destroyed."""
        group = self._group()
        if group is None:
            raise RuntimeError("Transport: its process group was destroyed (torch.distributed.destroy_process_group)")
        return group

    def agree_on_chunk(self, num_bytes: int) -> None:
        """ValueError where ranks come with chunks of other sizes; asked once a size. Collective.

        Without it a backend may take a shorter message for a longer one and leave the rest of the row unwritten.
        """
        if num_bytes in self._agreed:
            return
        everyone = [0] * self.group.size()
        dist.all_gather_object(everyone, num_bytes, group=self.group)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise ValueError(
                    f"Transport: a chunk is {everyone[0]} bytes on rank 0 and {other} bytes on rank {rank}; "
                    "all ranks must pass chunks of one size"
                )
        self._agreed.add(num_bytes)

    @abstractmethod
    def gather(self, schedule: Schedule, sent: Rows, received: Rows) -> Work:
        """SparseAllGather (paper, section 3.1).

        Args:
            schedule: from `gather_schedule`.
            sent: this rank's rows under `schedule.src`, at least those that it sends.
            received: where the rows go that this rank holds under `schedule.dst` only.
        """

    @abstractmethod
    def reduce(self, schedule: Schedule, contributed: Rows, sums: Rows, wire: torch.dtype) -> Work:
        """SparseReduceScatter (paper, section 3.1), summed in the order of `collectives.order`.

        Args:
            schedule: a gather's schedule, reversed.
            contributed: this rank's rows under `schedule.src`.
            sums: this rank's rows under `schedule.dst`, to be written; zero where nobody contributes.
            wire: dtype of every rank's contributions.
        """
