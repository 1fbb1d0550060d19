"""Descriptions of the experts of a model's MoE layers, made by adapters: original names, shapes and dtypes."""

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
"""Prefix of the names of the pools' parameters on the model."""

ExpertMLP = Callable[[Tensor, Groups, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class WeightSpec:
    """One kind of weight of a layer's experts.

    Attributes:
        kind: name of the attribute on the experts module, e.g. "up".
        shape: shape for one expert.
        dtype: dtype of the model's own parameter.
        trainable: whether it requires gradients.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool


@dataclass(frozen=True)
class ExpertsSpec:
    """What an adapter finds in one MoE layer.

    Attributes:
        name: name of the experts module in the model; its weights are called `name.kind`.
        num_experts: number of experts of the layer.
        width: width d of a token's hidden state.
        weights: the weight kinds, in a fixed order.
        mlp: `(rows [N, d] sorted by expert, groups, {kind: [experts, *shape]}) -> [N, d]`, differentiable.
    """

    name: str
    num_experts: int
    width: int
    weights: tuple[WeightSpec, ...]
    mlp: ExpertMLP


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a layer's experts, resolved from the config.

    Attributes:
        master: dtype of owned weights.
        param: dtype of compute and copies.
        reduce: dtype in which weight gradients are sent between devices.
        wire: dtype in which tokens, results and the gradients of both are sent between devices, at most as wide as
            `param`; None: as computed.
    """

    master: torch.dtype
    param: torch.dtype
    reduce: torch.dtype
    wire: torch.dtype | None

    @property
    def token(self) -> torch.dtype:
        """The dtype in which tokens are sent."""
        return self.wire or self.param


@dataclass(frozen=True)
class OwnedExperts:
    """The experts of one stacked weight of the model that this rank owns, and their slots in a pool.

    Attributes:
        name: name of the stacked weight in the model, e.g. "blocks.0.moe.experts.up".
        parameter: the pool's parameter; this rank has `[slots, *shape]` of it.
        placement: the owner of each expert of the layer.
        experts: int64 `[owned]`, ascending ids of this rank's experts.
        slots: the slots of these experts in the pool, in the same order.
    """

    name: str
    parameter: nn.Parameter
    placement: Placement
    experts: NDArray[np.int64]
    slots: slice

    @property
    def num_experts(self) -> int:
        """Number of experts of the layer."""
        return self.placement.num_experts

    def of(self, local: Tensor) -> Tensor:
        """The rows `[owned, ...]` of `local` `[slots, ...]`, which may be the parameter, its gradient or state."""
        return local[self.slots]
