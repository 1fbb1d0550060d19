"""The token exchange of one layer: the plain one, or the one that knows nodes where the cost model prefers that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hecate.cost import LayerCost
from hecate.planning.plan import Plan
from hecate.runtime import exchange, node_exchange
from hecate.runtime.copies import Comms
from hecate.runtime.exchange import Dispatch
from hecate.runtime.node_exchange import NodeDispatch

__all__ = ["Dispatch", "NodeDispatch", "bring_back", "dispatch_of", "send_out"]


def dispatch_of(
    plan: Plan,
    index: Tensor,
    comms: Comms,
    local_rows: Sequence[int],
    cost: LayerCost,
    wire: torch.dtype | None = None,
) -> Dispatch | NodeDispatch:
    """The record that `plan` means for this device. Collective.

    Args:
        plan: whose quota row of this device counts `index`.
        index: `[T, k]` expert of each token copy.
        comms: this device's process groups and topology.
        local_rows: experts held here, in the order of their rows.
        cost: of the layer; it decides which exchange.
        wire: dtype of rows between devices, e.g. torch.bfloat16; None keeps theirs.
    """
    if comms.tokens is not None and node_exchange.node_exchange_pays(plan, cost, index.shape[1]):
        return node_exchange.node_dispatch_of(plan, index, comms, local_rows, wire)
    return exchange.dispatch_of(plan, index, comms.rank, local_rows, wire)


def send_out(hidden: Tensor, record: Dispatch | NodeDispatch, comms: Comms) -> Tensor:
    """Tokens `[T, d]` to the rows `[M, d]` that this device computes, sorted by its experts' rows."""
    if isinstance(record, NodeDispatch):
        return node_exchange.send_out(hidden, record, comms)
    return exchange.send_out(hidden, record, comms)


def bring_back(rows: Tensor, weights: Tensor, record: Dispatch | NodeDispatch, comms: Comms) -> Tensor:
    """Results `[M, d]` to the weighted sums `[T, d]` of this device's tokens."""
    if isinstance(record, NodeDispatch):
        return node_exchange.bring_back(rows, weights, record, comms)
    return exchange.bring_back(rows, weights, record, comms)
