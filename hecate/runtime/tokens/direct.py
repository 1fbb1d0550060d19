"""The plain dispatch: one all-to-all of rows to the experts and one back; in backward the same for gradients.

What the exchange does not need is computed after its launch: the inverse of `order`, and the order by expert.

Shapes: T tokens of this device, k experts per token, N rows sent, M rows received, d model width. Copies of a token
without an expert (-1) are not sent: then N < T * k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hecate._native import direct_tables
from hecate.ops.linear import linear
from hecate.ops.permute import block_order, combine, invert, sort_by_expert, sum_copies, take_copies
from hecate.ops.upload import upload
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.exchange import Sending
from hecate.runtime.tokens.straight import Part, Straight

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DirectDispatch", "direct_dispatch"]


@dataclass(frozen=True, eq=False)
class DirectDispatch(Straight):
    """The dispatch by PyTorch's operations; see `Straight`.

    Attributes:
        copies: T * k, including copies without an expert.
        wire: dtype of rows between devices; None keeps theirs.
    """

    copies: int
    wire: torch.dtype | None

    @cached_property
    def inverse(self) -> Tensor:
        """int64 `[T * k]`, the inverse of `order`; N for copies without an expert."""
        return invert(self.order, self.copies)

    def dispatch(
        self,
        hidden: Tensor,
        dtype: torch.dtype | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        beside: Callable[[], None] | None = None,
    ) -> Tensor:
        def there(tokens: Tensor) -> Callable[[], Tensor]:
            arrive = self.leave(take_copies(tokens, self.order, self.top_k))
            _ = self.inverse  # while the rows are on their way
            return arrive

        def back(rows: Tensor) -> Callable[[], Tensor]:
            arrive = self.come_home(rows, meanwhile)
            return lambda: sum_copies(arrive(), self.inverse, self.top_k)

        tokens = hidden.to(dtype or hidden.dtype)
        return linear(tokens, there, back, beside)

    def pack(self, hidden: Tensor, dtype: torch.dtype | None) -> Tensor:
        def there(tokens: Tensor) -> Callable[[], Tensor]:
            return lambda: take_copies(tokens, self.order, self.top_k)

        def back(rows: Tensor) -> Callable[[], Tensor]:
            return lambda: sum_copies(rows, self.inverse, self.top_k)

        return linear(hidden.to(dtype or hidden.dtype), there, back)

    def add_up(self, rows: Tensor, weights: Tensor, dtype: torch.dtype | None) -> Tensor:
        return combine(rows, weights, self.inverse).to(dtype or rows.dtype)

    def leave(self, rows: Tensor) -> Callable[[], Tensor]:
        with self.comms.guard():
            sending = Sending(rows, self.sent, self.received, self.comms, self.wire)
            order = self.local_order  # while the rows are on their way
        return sending.wait if order is None else lambda: sending.wait().index_select(0, order)

    def come_home(self, rows: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Callable[[], Tensor]:
        if self.local_inverse is not None:
            rows = rows.index_select(0, self.local_inverse)
        with self.comms.guard():
            sending = Sending(rows, self.received, self.sent, self.comms, self.wire)
            meanwhile()
        return sending.wait

    def with_order(self, order: Tensor) -> Self:
        return replace(self, order=order)

    def of_packed(self, part: Part) -> Self:
        return replace(self, **part._asdict(), top_k=1, copies=len(part.order))


def direct_dispatch(
    plan: Plan,
    index: Tensor,
    comms: Comms,
    local_rows: Sequence[int],
    wire: torch.dtype | None = None,
    by_expert: Tensor | None = None,
) -> DirectDispatch:
    """Make this device's dispatch according to `plan`.

    Args:
        plan: made from the counts of `index`, so that this device's quota row adds up to them.
        index: `[T, k]` expert of each token copy; -1: none.
        comms: this device's process groups and topology.
        local_rows: experts held here, in the order of their rows.
        wire: dtype of rows between devices, e.g. torch.bfloat16; None keeps theirs.
        by_expert: `sort_by_expert(index)`, if that is there already.
    """
    table, leaving, sent, received, sizes = direct_tables(plan.holders, plan.quota, comms.rank, list(local_rows))
    both = upload(torch.from_numpy(table), index.device)
    # Sorted by expert, this device's rows are consecutive blocks, one per pair. Reorder the blocks by destination.
    order = sort_by_expert(index, len(plan.owners)) if by_expert is None else by_expert
    order = order[index.numel() - sum(sent) :]  # copies without an expert come first
    if comms.topology.num_devices > 1:
        order = order.index_select(0, block_order(both[: 2 * leaving].view(2, -1), sum(sent)))
    blocks = both[2 * leaving :].view(2, -1) if len(table) > 2 * leaving else None
    return DirectDispatch(order, sent, received, blocks, sizes, index.shape[1], comms, index.numel(), wire)
