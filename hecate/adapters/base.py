"""What an adapter must find in a model, and who adapts what.

FSSDP replaces the *experts module* of each MoE layer: the module that holds the stacked weights of all experts and is
called as `experts(hidden_states [T, d], top_k_index [T, k], top_k_weights [T, k]) -> [T, d]`. Router, shared experts
and auxiliary loss stay the model's own.

The simplest way to fit is to have two members on that module (`OwnExperts`):

- `expert_weights: tuple[str, ...]`: names of the stacked parameters, first dimension the experts;
- `expert_mlp(rows [N, d], groups, {name: [experts, ...]}) -> [N, d]`: the experts, for rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from hecate.ops.grouped import Groups
from hecate.runtime.chunk import ExpertsSpec, WeightSpec

__all__ = ["FoundExperts", "OwnExperts", "find_experts"]


@runtime_checkable
class OwnExperts(Protocol):
    """An experts module that says itself what FSSDP must know."""

    expert_weights: tuple[str, ...]

    def expert_mlp(self, x: Tensor, groups: Groups, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs `[N, d]` of rows `x [N, d]` sorted by expert; `weights` name -> `[experts, ...]`, any of them."""
        ...


@dataclass(frozen=True)
class FoundExperts:
    """One MoE layer of a model: where its experts module is, and what it is."""

    parent: nn.Module
    attribute: str
    module: nn.Module
    spec: ExpertsSpec


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """All MoE layers of `model`, in module order.

    Raises:
        ValueError: there is none.
    """
    found = []
    for name, module in model.named_modules():
        if name and isinstance(module, OwnExperts):
            parent, _, attribute = name.rpartition(".")
            spec = _own_spec(name, module)
            found.append(FoundExperts(model.get_submodule(parent), attribute, model.get_submodule(name), spec))
    if not found:
        raise ValueError(
            f"fully_shard: {type(model).__name__} has no MoE layer: no submodule has `expert_weights` and `expert_mlp` "
            "(see hecate.adapters.base)"
        )
    return found


def _own_spec(name: str, module: OwnExperts) -> ExpertsSpec:
    stacked = {kind: getattr(module, kind) for kind in module.expert_weights}
    sizes = {kind: tuple(w.shape) for kind, w in stacked.items()}
    if len({shape[0] for shape in sizes.values()}) != 1:
        raise ValueError(f"{name}: stacked weights {sizes} must have the same number of experts as first dimension")
    weights = tuple(WeightSpec(k, tuple(w.shape[1:]), w.dtype, w.requires_grad) for k, w in stacked.items())
    first = next(iter(stacked.values()))
    return ExpertsSpec(name, first.shape[0], _width(name, weights), weights, module.expert_mlp)


def _width(name: str, weights: tuple[WeightSpec, ...]) -> int:
    matrices = [w.shape for w in weights if len(w.shape) == 2]
    if not matrices:
        raise ValueError(f"{name}: weights {[w.shape for w in weights]} have no matrix [outputs, inputs] an expert")
    return matrices[0][1]
