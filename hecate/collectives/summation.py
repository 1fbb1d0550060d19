"""The one order in which every reduction adds (docs/design.md, decision 2), whatever the route or transport.

The ranks of a node ascending, then the nodes ascending; partial sums in a wider dtype; one cast at the owner.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hecate.collectives.staging import Staging
from hecate.placement import Topology

__all__ = ["OrderedSum", "accumulation_dtype", "ordered_sum"]

_ADDED_AS_THEY_ARE = (
    *(torch.float64, torch.float32, torch.complex128, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
_ADDED_WIDER = {
    **dict.fromkeys((torch.bfloat16, torch.float16), torch.float32),
    **dict.fromkeys((torch.float8_e4m3fn, torch.float8_e4m3fnuz), torch.float32),
    **dict.fromkeys((torch.float8_e5m2, torch.float8_e5m2fnuz), torch.float32),
    torch.complex32: torch.complex64,
    # torch adds no unsigned integers wider than 8 bits. Sums wrap around as theirs would when they are cast back.
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}
_PROMOTED = (*_ADDED_AS_THEY_ARE, torch.bfloat16, torch.float16)
"""What torch adds to its accumulation dtype without a cast before."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial sums: float32 for narrower floating-point types, else one that loses nothing.

    Raises:
        TypeError: for dtypes that have no sum, such as bool and packed or quantized ones.
    """
    if dtype in _ADDED_AS_THEY_ARE:
        return dtype
    if dtype not in _ADDED_WIDER:
        summed = ", ".join(sorted(str(d).removeprefix("torch.") for d in (*_ADDED_AS_THEY_ARE, *_ADDED_WIDER)))
        raise TypeError(f"sparse_reduce_scatter: dtype {dtype} has no sum; convert to one of {summed}")
    return _ADDED_WIDER[dtype]


class OrderedSum:
    """A sum to which rows are added one by one.

    Contributions must arrive in summation order; this rank's own is inserted automatically.

    Args:
        topology: says which ranks share a node.
        staging: where memory is taken from, and where scratch rows go when they have been added.
        own: this rank and its row, if it contributes.
        out: row in accumulation dtype that gets the sum; None takes one from `staging`.
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
            scratch: whether `row` is staging memory, which the sum takes over.
            last: whether nothing else of this node comes, except perhaps this rank's own row.
        """
        node = self._topology.node_of(first)
        if self._own is not None and self._own[0] < first and self._own_node != node:
            self._add_own()
        if node != self._node:
            self._close_node()
            self._node = node
        if self._own is not None and self._own[0] < first:
            if self._partial is None and scratch and row.dtype == accumulation_dtype(row.dtype):
                _add(row, self._take_own())  # row + own instead of own + row: the same bits, and no copy
            else:
                self._accumulate(self._take_own())
        own_follows = self._own is not None and self._own_node == node
        self._accumulate(row, scratch, alone=last and not own_follows)
        if last:
            if own_follows:
                self._accumulate(self._take_own())
            self._close_node()

    def result(self) -> Tensor | None:
        """The sum in `accumulation_dtype`; None if nothing was added. To be called once, at the end."""
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
        """Add this rank's own row; nothing more of its node comes."""
        if self._own_node != self._node:
            self._close_node()
            self._node = self._own_node
        self._accumulate(self._take_own(), alone=True)

    def _accumulate(self, row: Tensor, scratch: bool = False, alone: bool = False) -> None:
        """Add to the sum of the present node.

        Args:
            row: to add.
            scratch: whether it is staging memory.
            alone: whether nothing follows it in its node. If nothing came before it either, it is added to the total
                right away, which saves a copy.
        """
        into = self._total if alone and self._partial is None else self._partial
        if into is None:
            self._partial = self._begin(row, scratch)
            return
        _add(into, row)
        if scratch:
            self._staging.give(row)

    def _begin(self, row: Tensor, scratch: bool) -> Tensor:
        """Memory in accumulation dtype that holds `row`: the result's, the row's own, or new."""
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
        """Add the sum of the present node to the total."""
        partial, self._partial = self._partial, None
        if partial is None:
            return
        if self._total is None:
            self._total = partial
        else:
            self._total.add_(partial)
            self._staging.give(partial)


def ordered_sum(rows: Mapping[int, Tensor], topology: Topology) -> Tensor:
    """Sum of one chunk's contributions, at least one: device -> flat row. In `accumulation_dtype`."""
    total = OrderedSum(topology, Staging())
    for device in sorted(rows):
        total.add(device, rows[device])
    result = total.result()
    assert result is not None
    return result


def _add(into: Tensor, row: Tensor) -> None:
    into.add_(row if row.dtype in _PROMOTED else row.to(into.dtype))
