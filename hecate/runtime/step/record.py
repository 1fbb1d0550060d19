"""What one MoE layer did with one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hecate.planning.plan import Plan
from hecate.runtime.experts.copies import LayerCopies
from hecate.runtime.tokens.exchange import Dispatch

__all__ = ["LayerRecord"]


@dataclass(frozen=True)
class LayerRecord:
    """Kept so that recomputation and backward use the same plan as forward (docs/design.md, decision 5).

    Attributes:
        counts: int64 `[D, E]`, tokens each device routed to each expert.
        top_k: experts per token.
        plan: which device computes which tokens.
        dispatch: where this device's rows go.
        copies: the experts held here.
        absent: bool `[T, k]`, which copies of tokens have no expert; None: all have one.
    """

    counts: NDArray[np.int64]
    top_k: int
    plan: Plan
    dispatch: Dispatch
    copies: LayerCopies
    absent: Tensor | None = None

    def weights(self, top_k_weights: Tensor) -> Tensor:
        """`[T, k]`: the router's weights, zero where there is no expert."""
        return top_k_weights if self.absent is None else top_k_weights.masked_fill(self.absent, 0)
