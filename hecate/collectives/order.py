"""The one summation order of every reduction (DESIGN, decision 2), whatever the schedule or transport.

Ranks of a node ascending, then nodes ascending; partial sums in float32 (float64 for float64); one cast at the owner.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hecate.placement import Topology

__all__ = ["OrderedSum", "accumulation_dtype", "ordered_sum"]


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


class OrderedSum:
    """A sum under way: what is added must come in the one order; own rows find their place by themselves.

    Args:
        topology: says which ranks share a node.
        own: (rank, row) to add when its turn comes.
    """

    def __init__(self, topology: Topology, own: tuple[int, Tensor] | None = None) -> None:
        self._topology = topology
        self._own = own
        self._node = -1
        self._partial: Tensor | None = None  # of the present node
        self._total: Tensor | None = None  # of the nodes before it

    def add(self, first: int, row: Tensor, scratch: bool = False) -> None:
        """Add a contribution, or a sum of several.

        Args:
            first: the lowest rank whose contribution is in `row`.
            row: in wire or accumulation dtype.
            scratch: whether the sum may be made in `row` itself.
        """
        if self._own is not None and self._own[0] < first:
            self._add_own()
        node = self._topology.node_of(first)
        if node == self._node and self._partial is not None:
            self._partial.add_(row)
            return
        self._close_node()
        wide = accumulation_dtype(row.dtype)
        self._node, self._partial = node, row if scratch and row.dtype == wide else row.to(wide, copy=True)

    def result(self) -> Tensor | None:
        """The sum in `accumulation_dtype`; None where nothing was added. Ends it."""
        if self._own is not None:
            self._add_own()
        self._close_node()
        return self._total

    def _add_own(self) -> None:
        assert self._own is not None
        own, self._own = self._own, None
        self.add(*own)

    def _close_node(self) -> None:
        partial, self._partial = self._partial, None
        if partial is not None:
            self._total = partial if self._total is None else self._total.add_(partial)


def ordered_sum(rows: Mapping[int, Tensor], topology: Topology) -> Tensor:
    """Sum of one chunk's contributions, at least one, device -> row, in `accumulation_dtype`."""
    total = OrderedSum(topology)
    for device in sorted(rows):
        total.add(device, rows[device])
    result = total.result()
    assert result is not None
    return result
