"""What carries chunks between devices: allocation apart from the call, starting apart from waiting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

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
        self.group = group
        self.topology = topology

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
