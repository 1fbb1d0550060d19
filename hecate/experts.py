"""What an adapter finds in a model: the experts of its MoE layers, by original names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hecate.ops.grouped import Groups
from hecate.placement import Placement

__all__ = ["POOL_PREFIX", "Dtypes", "ExpertMLP", "ExpertsSpec", "OwnedExperts", "WeightSpec"]

POOL_PREFIX = "hecate_pool_"
"""Names of the pools' parameters on the model begin with it."""

ExpertMLP = Callable[[Tensor, Groups, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class WeightSpec:
    """One weight kind of a layer's experts.

    Attributes:
        kind: its attribute on the experts module, e.g. "up".
        shape: of one expert.
        dtype: of the model's own parameter.
        trainable: whether it gets gradients.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool


@dataclass(frozen=True)
class ExpertsSpec:
    """What an adapter finds in one MoE layer.

    Attributes:
        name: of the experts module in the model; weights are called `name.kind`.
        num_experts: experts of the layer.
        width: of a token's hidden state, d.
        weights: their kinds, in a fixed order.
        mlp: `(rows [N, d] sorted by expert, groups, {kind: [experts, *shape]}) -> [N, d]`, differentiable.
    """

    name: str
    num_experts: int
    width: int
    weights: tuple[WeightSpec, ...]
    mlp: ExpertMLP


@dataclass(frozen=True)
class Dtypes:
    """Resolved precision.

    Attributes:
        master: of owned weights.
        param: of compute and copies.
        reduce: of weight gradients between devices.
        wire: of tokens, results and their gradients between devices, at most as wide as `param`; None: as computed.
    """

    master: torch.dtype
    param: torch.dtype
    reduce: torch.dtype
    wire: torch.dtype | None

    @property
    def token(self) -> torch.dtype:
        """What a token takes on the wire."""
        return self.wire or self.param


@dataclass(frozen=True)
class OwnedExperts:
    """The experts of one stacked weight of the model that this rank owns, and where a pool has them.

    Attributes:
        name: of the stacked weight in the model, e.g. "blocks.0.moe.experts.up".
        parameter: of the pool; this rank has `[slots, *shape]` of it.
        placement: the owner of each expert of the layer.
        experts: int64 `[owned]`, ascending ids of this rank's experts.
        slots: where they are in the pool, in the same order.
    """

    name: str
    parameter: nn.Parameter
    placement: Placement
    experts: NDArray[np.int64]
    slots: slice

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.placement.num_experts

    def of(self, local: Tensor) -> Tensor:
        """Rows `[owned, ...]` of `local` `[slots, ...]`: of the parameter, a gradient or optimizer state."""
        return local[self.slots]
