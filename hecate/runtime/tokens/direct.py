"""The plain dispatch: one all-to-all of rows to the experts and one back; in backward the same for gradients.

Shapes: T tokens of this device, k experts per token, N rows sent, M rows received, d model width, D devices,
P (expert, device) pairs of the plan. Copies of a token without an expert (-1) are not sent: then N < T * k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hecate.ops.permute import block_order, combine, invert, permute
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.exchange import AllToAll, Dispatch, order_by_expert, sorted_by_expert

__all__ = ["DirectDispatch", "direct_dispatch"]


@dataclass(frozen=True)
class DirectDispatch(Dispatch):
    """Sends each row directly to the device that computes it.

    Attributes:
        order, inverse: int64 `[N]` and `[T * k]`, how rows are sorted by (destination, expert), and the inverse.
        sent, received: number of rows to and from each device.
        local_order, local_inverse: int64 `[M]`, permutation that sorts received rows by (row of the expert here,
            source), and its inverse.
        sizes: received rows per expert held here, in the order of the experts' rows.
        top_k: experts per token.
        wire: dtype of rows between devices; None keeps theirs.
        comms: process groups of the devices that share the experts.
    """

    order: Tensor
    inverse: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    local_order: Tensor
    local_inverse: Tensor
    sizes: tuple[int, ...]
    top_k: int
    wire: torch.dtype | None
    comms: Comms

    def dispatch(self, hidden: Tensor) -> Tensor:
        rows = permute(hidden, self.order, self.inverse, self.top_k)
        rows = AllToAll.apply(rows, self.sent, self.received, self.comms, self.wire)
        return permute(rows, self.local_order, self.local_inverse, 1)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        rows = permute(rows, self.local_inverse, self.local_order, 1)
        rows = AllToAll.apply(rows, self.received, self.sent, self.comms, self.wire)
        return combine(rows, weights, self.order, self.inverse)


def direct_dispatch(
    plan: Plan, index: Tensor, comms: Comms, local_rows: Sequence[int], wire: torch.dtype | None = None
) -> DirectDispatch:
    """Make this device's dispatch according to `plan`.

    Args:
        plan: made from the counts of `index`, so that this device's quota row adds up to them.
        index: `[T, k]` expert of each token copy; -1: none.
        comms: this device's process groups and topology.
        local_rows: experts held here, in the order of their rows.
        wire: dtype of rows between devices, e.g. torch.bfloat16; None keeps theirs.
    """
    device, rank = index.device, comms.rank
    num_devices = plan.quota.shape[0]
    expert, holder = plan.holders.T
    # Sorted by expert, this device's rows are consecutive blocks, one per pair. Reorder the blocks by destination.
    to_pair = plan.quota[rank]
    by_expert = sorted_by_expert(index, int(to_pair.sum()))
    order = by_expert[block_order(to_pair, np.lexsort((expert, holder)), device)]
    sent = np.bincount(holder, weights=to_pair, minlength=num_devices).astype(np.int64)

    local_order, sizes = order_by_expert(plan, plan.quota, rank, local_rows, device)
    received = plan.quota[:, holder == rank].sum(axis=1)
    return DirectDispatch(
        order,
        invert(order, index.numel()),
        tuple(sent.tolist()),
        tuple(received.tolist()),
        local_order,
        invert(local_order),
        sizes,
        index.shape[1],
        wire,
        comms,
    )
