"""The plain dispatch (`hecate.runtime.tokens.direct`) by Hecate's kernels: fewer passes over the rows.

Tokens are written into the send buffer in its order and dtype, and received rows into the order of the experts, in the
dtype that they compute in; the results are summed from where they arrived. Where the wire's dtype is narrower than that
of compute, rows that stay on their device are read where they are, and are not rounded.

Shapes: T tokens of this device, k experts per token, N rows sent, M rows received, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hecate._native import sort_tables
from hecate.ops.kernels.registered import combine_rows, gather_rows, scatter_rows, sort_copies
from hecate.ops.kernels.rows import OwnRows
from hecate.ops.kernels.tokens import ExpertCounts
from hecate.ops.linear import linear
from hecate.ops.permute import combine, invert
from hecate.ops.upload import upload
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.exchange import Sending
from hecate.runtime.tokens.straight import Part, Straight

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["KernelDispatch", "kernel_dispatch"]


@dataclass(frozen=True, eq=False)
class KernelDispatch(Straight):
    """The dispatch by Hecate's kernels; see `Straight`.

    Attributes:
        inverse: int64 `[T * k]`, the inverse of `order`; -1 for copies without an expert.
        dtype: dtype in which the experts compute.
        wire: dtype of rows between devices, at most as wide; `dtype` on one device.
    """

    inverse: Tensor
    dtype: torch.dtype
    wire: torch.dtype

    @property
    def rounds(self) -> bool:
        """Whether rows are rounded on their way to other devices."""
        return self.wire != self.dtype

    def dispatch(
        self,
        hidden: Tensor,
        dtype: torch.dtype | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        beside: Callable[[], None] | None = None,
    ) -> Tensor:
        home = hidden.dtype
        return linear(hidden, self._send_tokens, lambda rows: self._sum_home(rows, home, meanwhile), beside)

    def pack(self, hidden: Tensor, dtype: torch.dtype | None) -> Tensor:
        home = hidden.dtype

        def there(tokens: Tensor) -> Callable[[], Tensor]:
            return lambda: scatter_rows(tokens, self.inverse, self.top_k, self.order.numel(), self.dtype)

        def back(rows: Tensor) -> Callable[[], Tensor]:
            return lambda: combine_rows(rows, self.inverse, None, self.top_k, home)

        return linear(hidden, there, back)

    def add_up(self, rows: Tensor, weights: Tensor, dtype: torch.dtype | None) -> Tensor:
        return combine(rows, weights, self.inverse, by_kernels=True).to(dtype or rows.dtype)

    def with_order(self, order: Tensor) -> Self:
        return replace(self, order=order, inverse=invert(order, self.inverse.numel(), absent=-1))

    def of_packed(self, part: Part) -> Self:
        return replace(self, **part._asdict(), inverse=part.order, top_k=1)

    # Without autograd. All launch an exchange and return what waits for its rows.
    # Tokens to their experts, and the sum of their rows' gradients.

    def _send_tokens(self, hidden: Tensor) -> Callable[[], Tensor]:
        own, skip = None, (0, 0)
        if self.rounds:
            hidden, skip = hidden.to(self.dtype), self._here(self.sent)
            own = OwnRows(hidden, self.order[slice(*skip)], *self._here(self.received), self.top_k)
        packed = scatter_rows(hidden, self.inverse, self.top_k, self.order.numel(), self.wire, skip)
        arrive = self._launched(packed, self.sent, self.received)
        return lambda: self._in_order(arrive(), self.local_order, own)

    def _sum_home(self, rows: Tensor, home: torch.dtype, meanwhile: Callable[[], None]) -> Callable[[], Tensor]:
        arrive = self._launched(self._packed(rows), self.received, self.sent, meanwhile)
        own = self._own(rows, self.local_inverse, self.received, self.sent)
        dtype = self.dtype if self.rounds else home
        return lambda: combine_rows(arrive(), self.inverse, None, self.top_k, dtype, own).to(home)

    # Rows in the order that they are sent in to rows by expert on the experts' devices, and back.

    def leave(self, rows: Tensor) -> Callable[[], Tensor]:
        arrive = self._launched(rows.to(self.wire), self.sent, self.received)
        own = self._own(rows, None, self.sent, self.received)
        return lambda: self._in_order(arrive(), self.local_order, own)

    def come_home(self, rows: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Callable[[], Tensor]:
        arrive = self._launched(self._packed(rows), self.received, self.sent, meanwhile)
        own = self._own(rows, self.local_inverse, self.received, self.sent)
        return lambda: self._in_order(arrive(), None, own)

    # Parts of these.

    def _packed(self, rows: Tensor) -> Tensor:
        """Rows by expert in the order that they came in, in the dtype of the wire."""
        inverse = self.local_inverse
        return rows.to(self.wire) if inverse is None else gather_rows(rows, inverse, self.wire)

    def _launched(
        self,
        packed: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Callable[[], Tensor]:
        """Launch an exchange; what is returned waits for the rows that other devices sent here. Collective."""
        with self.comms.guard():
            sending = Sending(packed.contiguous(), sent, received, self.comms, None)
            meanwhile()
            _ = self.local_order  # while the rows are on their way
        return sending.wait

    def _in_order(self, arrived: Tensor, order: Tensor | None, own: OwnRows | None) -> Tensor:
        """`arrived` in `order` and in the dtype of compute, own rows from where they are."""
        if order is None:
            if own is None:
                return arrived
            order = torch.arange(arrived.shape[0], device=arrived.device)
        return gather_rows(arrived, order, self.dtype, own)

    def _own(
        self, rows: Tensor, index: Tensor | None, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> OwnRows | None:
        """The rows that this device sends to itself: of `rows[index]`, among those that it receives.

        None if rows are not rounded on their way: then they may arrive as all others.
        """
        if not self.rounds:
            return None
        begin, end = self._here(sent)
        place = torch.arange(begin, end, device=rows.device) if index is None else index[begin:end]
        return OwnRows(rows.contiguous(), place, *self._here(received))

    def _here(self, counts: tuple[int, ...]) -> tuple[int, int]:
        """Range of the rows of this device among rows sorted by device."""
        begin = sum(counts[: self.comms.rank])
        return begin, begin + counts[self.comms.rank]


def kernel_dispatch(
    plan: Plan,
    index: Tensor,
    comms: Comms,
    local_rows: Sequence[int],
    dtype: torch.dtype,
    wire: torch.dtype | None,
    counted: ExpertCounts,
) -> KernelDispatch:
    """Make this device's dispatch according to `plan`.

    Args:
        plan: made from the counts of `index`, so that this device's quota row adds up to them.
        index: `[T, k]` expert of each token copy; -1: none.
        comms: this device's process groups and topology.
        local_rows: experts held here, in the order of their rows.
        dtype: dtype in which the experts compute.
        wire: dtype of rows between devices; None keeps theirs.
        counted: `count_experts(index)`.
    """
    experts, pairs = len(plan.owners), len(plan.holders)
    table, sent, received, sizes = sort_tables(plan.holders, plan.quota, comms.rank, list(local_rows), experts)
    parts = [experts + 1, pairs, pairs, len(table) - experts - 1 - 2 * pairs]
    first, before, start, blocks = upload(torch.from_numpy(table), index.device).split(parts)
    order, inverse = sort_copies(index, counted, first, before, start, sum(sent))
    by_expert = blocks.view(2, -1) if parts[-1] else None
    travels = dtype if comms.tokens is None else wire or dtype
    return KernelDispatch(order, sent, received, by_expert, sizes, index.shape[1], comms, inverse, dtype, travels)
