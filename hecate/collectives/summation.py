"""The one summation order of every reduction (DESIGN, decision 2), whatever the schedule or transport.

Ranks of a node ascending, then nodes ascending; partial sums in float32 (float64 for float64); one cast at the owner.
"""

from __future__ import annotations

from bisect import bisect_left, insort_left
from collections.abc import Mapping

import torch
from torch import Tensor

from hecate.placement import Topology

__all__ = ["OrderedSum", "Staging", "accumulation_dtype", "ordered_sum"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial sums: float32 for narrower floating-point types, else the type itself.

    Raises:
        TypeError: for bool, which has no sum of its own type.
    """
    if dtype == torch.bool:
        raise TypeError("sparse_reduce_scatter: dtype torch.bool has no sum; convert to an integer type")
    if dtype.is_floating_point and dtype != torch.float64:
        return torch.float32
    return dtype


class Staging:
    """Memory of pieces on their way, used again: fresh memory costs a page fault every few KiB on CPU.

    Never more buffers than pieces that were on their way at once, none larger than the largest of them, whatever sizes
    come one after the other. Buffers only grow, so calls that repeat soon allocate nothing.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Tensor]] = {}  # bytes, ascending size

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialized `[numel]`."""
        size = numel * dtype.itemsize
        free = self._free.setdefault(device, [])
        at = bisect_left(free, size, key=Tensor.numel)
        if at < len(free):
            memory = free.pop(at)
        else:
            if free:
                free.pop()  # all are too small: the new one takes the place of the largest
            with torch.inference_mode(False):  # a call in inference mode may come first
                memory = torch.empty(size, dtype=torch.uint8, device=device)
        return memory[:size].view(dtype)

    def give(self, piece: Tensor) -> None:
        """`piece` from `take` is not used any more."""
        memory = torch.empty(0, dtype=torch.uint8, device=piece.device).set_(piece.untyped_storage())
        # Before others of its size: what was used last is still in the caches.
        insort_left(self._free[piece.device], memory, key=Tensor.numel)


class OrderedSum:
    """A sum under way: what is added must come in the one order; the own row finds its place by itself.

    Args:
        topology: says which ranks share a node.
        staging: where memory comes from, and added scratch goes to.
        own: (rank, row) to add when its turn comes.
        out: in accumulation dtype, where the sum goes; else it comes from `staging`.
    """

    def __init__(
        self,
        topology: Topology,
        staging: Staging,
        own: tuple[int, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> None:
        self._topology = topology
        self._staging = staging
        self._own = own
        self._out = out
        self._node = -1
        self._partial: Tensor | None = None  # of the present node
        self._total: Tensor | None = None  # of the nodes before it

    def add(self, first: int, row: Tensor, scratch: bool = False, last: bool = False) -> None:
        """Add a contribution, or a sum of several.

        Args:
            first: the lowest rank whose contribution is in `row`.
            row: in wire or accumulation dtype.
            scratch: whether `row` is staging memory that the sum takes over.
            last: whether all else that is to be added is of other nodes, except the own row.
        """
        node = self._topology.node_of(first)
        if self._own is not None and self._own[0] < first and self._own_node != node:
            self._add_own()
        if node != self._node:
            self._close_node()
            self._node = node
        if self._own is not None and self._own[0] < first:
            if self._partial is None and scratch and row.dtype == accumulation_dtype(row.dtype):
                row.add_(self._take_own())  # the other way round, with the same bits
            else:
                self._accumulate(self._take_own())
        own_follows = self._own is not None and self._own_node == node
        self._accumulate(row, scratch, alone=last and not own_follows)
        if last:
            if own_follows:
                self._accumulate(self._take_own())
            self._close_node()

    def result(self) -> Tensor | None:
        """The sum in `accumulation_dtype`; None where nothing was added. Ends it."""
        if self._own is not None:
            self._add_own()
        self._close_node()
        return self._total

    @property
    def _own_node(self) -> int:
        assert self._own is not None
        return self._topology.node_of(self._own[0])

    def _take_own(self) -> Tensor:
        assert self._own is not None
        (_, row), self._own = self._own, None
        return row

    def _add_own(self) -> None:
        """The own row, when nothing more of its node comes."""
        if self._own_node != self._node:
            self._close_node()
            self._node = self._own_node
        self._accumulate(self._take_own(), alone=True)

    def _accumulate(self, row: Tensor, scratch: bool = False, alone: bool = False) -> None:
        """Add to the present node's; `alone`: it is all of it, unless others came before."""
        into = self._total if alone and self._partial is None else self._partial
        if into is None:
            self._partial = self._begin(row, scratch)
            return
        into.add_(row)
        if scratch:
            self._staging.give(row)

    def _begin(self, row: Tensor, scratch: bool) -> Tensor:
        wide = accumulation_dtype(row.dtype)
        if self._total is None and self._out is not None:
            memory = self._out
        elif scratch and row.dtype == wide:
            return row
        else:
            memory = self._staging.take(row.numel(), wide, row.device)
        memory.copy_(row)
        if scratch:
            self._staging.give(row)
        return memory

    def _close_node(self) -> None:
        partial, self._partial = self._partial, None
        if partial is None:
            return
        if self._total is None:
            self._total = partial
        else:
            self._total.add_(partial)
            self._staging.give(partial)


def ordered_sum(rows: Mapping[int, Tensor], topology: Topology) -> Tensor:
    """Sum of one chunk's contributions, at least one, device -> flat row, in `accumulation_dtype`."""
    total = OrderedSum(topology, Staging())
    for device in sorted(rows):
        total.add(device, rows[device])
    result = total.result()
    assert result is not None
    return result
