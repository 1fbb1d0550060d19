"""What carries chunks between devices. The caller allocates the memory; starting and waiting are two calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.moves import Moves
from hecate.placement import Topology

__all__ = ["Rows", "Transport", "Work"]

Rows = Mapping[int, Tensor]
"""expert -> one flat contiguous chunk."""


class Work:
    """Communication under way. `wait()` finishes it; further calls do nothing.

    On CUDA `wait()` makes the current stream wait, never the host.
    """

    def __init__(self, finish: Callable[[], object]) -> None:
        self._finish: Callable[[], object] | None = finish

    def wait(self) -> None:
        """Return when the results may be used on the current stream."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Transport(ABC):
    """Carries chunks between the ranks of one process group. `collectives.groups.transport_of` makes it.

    All ranks of the group call the same methods with the same moves and chunk size in the same order; nothing checks
    that here. A rank passes only the rows it takes part with, and leaves them untouched until `wait()`.
    """

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        if topology.num_devices != group.size():
            raise ValueError(
                f"Transport: topology has num_devices={topology.num_devices}, the process group {group.size()} ranks; "
                "they must be equal"
            )
        self._group = ref(group)  # torch keeps the group until it is destroyed; a transport must not
        self.topology = topology

    @property
    def remaining_group(self) -> dist.ProcessGroup | None:
        """The process group, or None once it was destroyed."""
        return self._group()

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; RuntimeError once it was destroyed."""
        group = self._group()
        if group is None:
            raise RuntimeError("Transport: its process group was destroyed (torch.distributed.destroy_process_group)")
        return group

    @abstractmethod
    def gather(self, moves: Moves, sent: Rows, received: Rows) -> Work:
        """SparseAllGather (paper, section 3.1).

        Args:
            moves: from `moves_between`.
            sent: this rank's rows under `moves.src`, at least those that it sends.
            received: where to write the rows that this rank holds under `moves.dst` only.
        """

    @abstractmethod
    def reduce(self, moves: Moves, contributed: Rows, sums: Rows, wire: torch.dtype) -> Work:
        """SparseReduceScatter (paper, section 3.1), summed in the order of `collectives.summation`.

        Args:
            moves: those of a gather, reversed.
            contributed: this rank's rows under `moves.src`.
            sums: where to write this rank's rows under `moves.dst`; zero if nobody contributes.
            wire: dtype of every rank's contributions.
        """

    def prepare_gather(self, moves: Moves, chunk_bytes: int) -> None:  # noqa: B027  # most transports need nothing
        """Compute in advance, in any thread, what `gather` needs for rows of `chunk_bytes`. Sends nothing."""

    def prepare_reduce(self, moves: Moves, numel: int, wire: torch.dtype) -> None:  # noqa: B027
        """Compute in advance, in any thread, what `reduce` needs for rows of `numel` elements. Sends nothing."""
