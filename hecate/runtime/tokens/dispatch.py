"""Chooses how the tokens of one layer travel: directly, or at most once to each other node."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.cost import LayerCost
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.by_node import node_dispatch, node_exchange_pays
from hecate.runtime.tokens.direct import direct_dispatch
from hecate.runtime.tokens.exchange import Dispatch

__all__ = ["dispatch_of"]


def dispatch_of(
    plan: Plan,
    index: Tensor,
    comms: Comms,
    local_rows: Sequence[int],
    cost: LayerCost,
    wire: torch.dtype | None = None,
    by_expert: Tensor | None = None,
    tokens: NDArray[np.int64] | None = None,
) -> Dispatch:
    """Make this device's dispatch according to `plan`. The host does not wait for the device.

    Args:
        plan: made from the counts of `index`, so that this device's quota row adds up to them.
        index: `[T, k]` expert of each token copy; -1: none.
        comms: this device's process groups and topology.
        local_rows: experts held here, in the order of their rows.
        cost: cost of the layer, by which the kind of dispatch is chosen.
        wire: dtype of rows between devices, e.g. torch.bfloat16; None keeps theirs.
        by_expert: `sort_by_expert(index)`, if that is there already.
        tokens: int64 `[D]`, tokens of each device; None: every copy on every device has an expert.
    """
    if comms.tokens is not None and node_exchange_pays(plan, cost, max(1, index.shape[1])):
        return node_dispatch(plan, index, comms, local_rows, wire, by_expert, tokens)
    return direct_dispatch(plan, index, comms, local_rows, wire, by_expert)
