"""What carries chunks between devices. The caller allocates the memory; starting and waiting are two calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.moves import Moves
from hecate.ops.kernels.stack import KindRows
from hecate.placement import Topology

__all__ = ["Into", "Rows", "Transport", "Work"]

Rows = Mapping[int, Tensor]
"""expert -> one flat contiguous chunk."""


@dataclass(frozen=True)
class Into:
    """Rows that get sums: `row += scale * sum`, or `row = scale * sum`.

    Attributes:
        kinds: the rows of each weight kind, in accumulation dtype.
        row_of: expert -> its row in each of them.
        scale: factor of the sums.
        overwrite: whether the rows' values before are lost.
    """

    kinds: Sequence[KindRows]
    row_of: Mapping[int, int]
    scale: float = 1.0
    overwrite: bool = False


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

    def close(self) -> None:  # noqa: B027  # most transports have nothing of their own to end
        """End what the transport runs itself, after what was started. It carries nothing more."""

    def room_to_gather(self, moves: Moves, numel: int, dtype: torch.dtype) -> None:  # noqa: B027
        """Make room for the rows of a `gather`, `numel` elements each. Collective; the next call must be that gather.

        A rank that takes no part in the gather does not see its rows, but memory that all ranks share can only grow on
        all of them. Transports without such memory do nothing.
        """

    def room_to_reduce(self, moves: Moves, numel: int, wire: torch.dtype) -> Tensor | None:
        """Make room for the rows of a `reduce`. Collective; the next call must be `reduce` or `accumulate`.

        Returns:
            `[rows, numel]` in `wire`, where this rank may write its rows of all experts in `moves.transfers`, by
            ascending id, so that they need not be copied before others read them; None: any memory will do.
        """
        return None

    def accumulates(self, wire: torch.dtype, dtype: torch.dtype) -> bool:
        """Whether `accumulate` can add contributions in `wire` to rows in `dtype`."""
        return False

    def accumulate(self, moves: Moves, contributed: Rows, into: Into, numel: int, wire: torch.dtype) -> Work:
        """As `reduce`, but add the sums to rows of the owner as they arrive, `row += scale * sum`, in the same order.

        Args:
            moves: as for `reduce`.
            contributed: as for `reduce`; an owner contributes to its experts itself.
            into: a row for each of this rank's experts in `moves.transfers`.
            numel: elements of a chunk.
            wire: as for `reduce`.

        Raises:
            NotImplementedError: `accumulates` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} adds no sums to rows of their owner")

    def prepare_gather(self, moves: Moves, chunk_bytes: int) -> None:  # noqa: B027  # most transports need nothing
        """Compute in advance, in any thread, what `gather` needs for rows of `chunk_bytes`. Sends nothing."""

    def prepare_reduce(self, moves: Moves, numel: int, wire: torch.dtype) -> None:  # noqa: B027
        """Compute in advance, in any thread, what `reduce` needs for rows of `numel` elements. Sends nothing."""
