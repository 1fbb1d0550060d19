"""What one MoE layer did with one micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hecate.planning.plan import Plan
from hecate.runtime.experts.copies import LayerCopies
from hecate.runtime.tokens.exchange import Dispatch
from hecate.runtime.tokens.halves import HalvedDispatch

__all__ = ["LayerRecord", "Planned"]


class Planned:
    """The counts and the plan of one call of a layer, made when they are first asked for.

    Args:
        make: returns int64 `[D, E]`, the tokens that each device routed to each expert, and the plan for them.
    """

    def __init__(self, make: Callable[[], tuple[NDArray[np.int64], Plan]]) -> None:
        self._make = make

    @cached_property
    def both(self) -> tuple[NDArray[np.int64], Plan]:
        """The counts and the plan. If the layer did not wait for the counts, the host waits here, the first time."""
        return self._make()


@dataclass(frozen=True)
class LayerRecord:
    """Kept so that recomputation and backward use the same plan as forward (docs/design.md, decision 5).

    Attributes:
        top_k: experts per token.
        planned: which device computes which tokens.
        dispatch: where this device's rows go.
        copies: the experts held here.
        absent: bool `[T, k]`, which copies of tokens have no expert; None: all have one.
    """

    top_k: int
    planned: Planned
    dispatch: Dispatch | HalvedDispatch
    copies: LayerCopies
    absent: Tensor | None = None

    def weights(self, top_k_weights: Tensor) -> Tensor:
        """`[T, k]`: the router's weights, zero where there is no expert."""
        return top_k_weights if self.absent is None else top_k_weights.masked_fill(self.absent, 0)
