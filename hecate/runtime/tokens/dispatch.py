"""Chooses how the tokens of one layer travel: directly, at once or in halves, or at most once to each other node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.config import TokenHalves
from hecate.cost import LayerCost
from hecate.ops.kernels.tokens import ExpertCounts
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.by_kernels import kernel_dispatch
from hecate.runtime.tokens.by_node import node_dispatch, node_exchange_pays
from hecate.runtime.tokens.direct import direct_dispatch
from hecate.runtime.tokens.exchange import Dispatch
from hecate.runtime.tokens.halves import HalvedDispatch, halved, halves_pay
from hecate.runtime.tokens.straight import Straight

__all__ = ["ByKernels", "dispatch_of"]


@dataclass(frozen=True)
class ByKernels:
    """What `kernel_dispatch` needs besides.

    Attributes:
        counted: copies per expert, as the counting kernel left them.
        dtype: dtype in which the experts compute.
    """

    counted: ExpertCounts
    dtype: torch.dtype


def dispatch_of(
    plan: Plan,
    index: Tensor,
    comms: Comms,
    local_rows: Sequence[int],
    cost: LayerCost,
    wire: torch.dtype | None = None,
    by_expert: Tensor | None = None,
    tokens: NDArray[np.int64] | None = None,
    by_kernels: ByKernels | None = None,
    halves: TokenHalves = False,
) -> Dispatch | HalvedDispatch:
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
        by_kernels: what Hecate's kernels need to run the direct dispatch; None: torch's operations run. The node-aware
            dispatch always runs those.
        halves: whether the direct dispatch runs in halves, if there are several devices; see
            `FSSDPConfig.token_halves`.
    """
    if comms.tokens is not None and node_exchange_pays(plan, cost, max(1, index.shape[1])):
        return node_dispatch(plan, index, comms, local_rows, wire, by_expert, tokens)
    whole: Straight
    if by_kernels is not None:
        whole = kernel_dispatch(plan, index, comms, local_rows, by_kernels.dtype, wire, by_kernels.counted)
    else:
        whole = direct_dispatch(plan, index, comms, local_rows, wire, by_expert)
    if comms.tokens is not None and (halves is True or (halves == "auto" and halves_pay(plan, cost))):
        return halved(whole, plan, local_rows)
    return whole
