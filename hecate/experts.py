"""Descriptions of the experts of a model's MoE layers, made by adapters: original names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hecate.ops.grouped import Groups
from hecate.placement import Placement

__all__ = ["POOL_PREFIX", "Dtypes", "Elsewhere", "ExpertMLP", "ExpertsSpec", "OwnedExperts", "WeightSpec"]

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
class Elsewhere:
    """A weight of the experts that the model keeps in another module than the experts module, in a shape of its own.

    Attributes:
        name: original name of the parameter.
        module: the module that has it.
        attribute: its name there.
        stacked: from its own shape to a stack `[experts, *shape]`.
        as_kept: from the stack to its own shape.
    """

    name: str
    module: nn.Module
    attribute: str
    stacked: Callable[[Tensor], Tensor]
    as_kept: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertsSpec:
    """What an adapter finds in one MoE layer.

    Attributes:
        name: name of the experts module in the model; its weights are called `name.kind`, except those elsewhere.
        num_experts: number of experts of the layer.
        width: width d of a token's hidden state.
        weights: the weight kinds, in a fixed order.
        mlp: `(rows [N, d] sorted by expert, groups, {kind: [experts, *shape]}) -> [N, d]`, differentiable.
        gated: activation of an MLP that is `down(act(gate) * up)` and nothing else, which `groups.gemm` may compute as
            a whole; None: another computation.
        elsewhere: the kinds that are no parameters of the experts module.
    """

    name: str
    num_experts: int
    width: int
    weights: tuple[WeightSpec, ...]
    mlp: ExpertMLP
    gated: str | None = None
    elsewhere: Mapping[str, Elsewhere] = field(default_factory=dict)

    def name_of(self, kind: str) -> str:
        """Original name of the weights of one kind."""
        return self.elsewhere[kind].name if kind in self.elsewhere else f"{self.name}.{kind}"

    def parameter(self, experts: nn.Module, kind: str) -> nn.Parameter:
        """The model's own parameter of one kind, in the shape that the model keeps it in.

        Args:
            experts: the experts module.
            kind: the kind.
        """
        place = self.elsewhere.get(kind)
        parameter: nn.Parameter = getattr(experts, kind) if place is None else getattr(place.module, place.attribute)
        return parameter

    def stack(self, experts: nn.Module, kind: str) -> Tensor:
        """The model's own weights of one kind `[experts, *shape]`, outside autograd."""
        own = self.parameter(experts, kind).detach()
        return self.elsewhere[kind].stacked(own) if kind in self.elsewhere else own


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a layer's experts, resolved from the config.

    Attributes:
        master: dtype of owned weights.
        param: dtype of compute and copies.
        reduce: dtype in which weight gradients are sent between devices.
        wire: dtype in which tokens, results and the gradients of both are sent between devices, at most as wide as
            `param`; None: as computed.
        adapters: dtype of owned weights of adapters (LoRA); None: `master`.
    """

    master: torch.dtype
    param: torch.dtype
    reduce: torch.dtype
    wire: torch.dtype | None
    adapters: torch.dtype | None = None

    def owned(self, spec: ExpertsSpec, kind: str) -> torch.dtype:
        """Dtype of owned weights of one kind."""
        return (self.adapters or self.master) if kind in spec.elsewhere else self.master

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
