"""The plain dispatch: one all-to-all of rows to the experts and one back; in backward the same for gradients.

What the exchange does not need is computed after its launch: the inverses and the order by expert.

Shapes: T tokens of this device, k experts per token, N rows sent, M rows received, d model width. Copies of a token
without an expert (-1) are not sent: then N < T * k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hecate._native import direct_tables
from hecate.ops.linear import linear
from hecate.ops.permute import block_order, combine, invert, sort_by_expert, sum_copies, take_copies
from hecate.ops.upload import upload
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.exchange import Dispatch, Sending

__all__ = ["DirectDispatch", "direct_dispatch"]


@dataclass(frozen=True, eq=False)
class DirectDispatch(Dispatch):
    """Sends each row directly to the device that computes it.

    Attributes:
        order: int64 `[N]`, the copies of tokens (`t * k + j`) sorted by (destination, expert).
        copies: T * k, including copies without an expert.
        sent, received: number of rows to and from each device.
        blocks: int64 `[2, B]`, how received rows are sorted by (row of the expert here, source), see `block_order`;
            None if they arrive in that order, for example because one expert is held here.
        sizes: received rows per expert held here, in the order of the experts' rows.
        top_k: experts per token.
        wire: dtype of rows between devices; None keeps theirs.
        comms: process groups of the devices that share the experts.
    """

    order: Tensor
    copies: int
    sent: tuple[int, ...]
    received: tuple[int, ...]
    blocks: Tensor | None
    sizes: tuple[int, ...]
    top_k: int
    wire: torch.dtype | None
    comms: Comms

    @cached_property
    def inverse(self) -> Tensor:
        """int64 `[T * k]`, the inverse of `order`; N for copies without an expert."""
        return invert(self.order, self.copies)

    @cached_property
    def local_order(self) -> Tensor | None:
        """int64 `[M]`, permutation that sorts received rows by (row of the expert here, source); None: sorted."""
        return None if self.blocks is None else block_order(self.blocks, sum(self.received))

    @cached_property
    def local_inverse(self) -> Tensor | None:
        """The inverse of `local_order`."""
        return None if self.local_order is None else invert(self.local_order)

    def dispatch(self, hidden: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        return linear(
            hidden,
            lambda tokens: self.leave(take_copies(tokens, self.order, self.top_k)),
            lambda rows: sum_copies(self.come_home(rows, meanwhile), self.inverse, self.top_k),
        )

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        if self.comms.tokens is not None or self.blocks is not None:
            rows = linear(rows, self.come_home, self.leave)
        return combine(rows, weights, self.inverse)

    # Without autograd.

    def leave(self, rows: Tensor) -> Tensor:
        """From rows in `order` here to rows by expert on the experts' devices. Collective."""
        with self.comms.guard():
            sending = Sending(rows, self.sent, self.received, self.comms, self.wire)
            order, _ = self.local_order, self.inverse  # while the rows are on their way
            rows = sending.wait()
        return rows if order is None else rows.index_select(0, order)

    def come_home(self, rows: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        """The reverse of `leave`. Collective."""
        if self.local_inverse is not None:
            rows = rows.index_select(0, self.local_inverse)
        with self.comms.guard():
            sending = Sending(rows, self.received, self.sent, self.comms, self.wire)
            meanwhile()
            return sending.wait()


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
    return DirectDispatch(order, index.numel(), sent, received, blocks, sizes, index.shape[1], wire, comms)
