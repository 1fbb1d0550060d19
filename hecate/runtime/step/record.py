"""What one MoE layer did with one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    """

    counts: NDArray[np.int64]
    top_k: int
    plan: Plan
    dispatch: Dispatch
    copies: LayerCopies
