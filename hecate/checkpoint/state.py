"""The content of an FSSDP checkpoint by original names: weights, buffers and the inputs of planning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hecate.checkpoint.rows import ExpertRows
from hecate.cost import CostModel
from hecate.experts import OwnedExperts
from hecate.names import original_name
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.step.engine import Engine
from hecate.text import listed
from hecate.values.local import local_tensor

__all__ = ["PLANS", "Entry", "TrainingState", "compare_names", "dense_tensors", "expert_rows"]

PLANS = "hecate."

Entry = ExpertRows | Tensor


@dataclass(frozen=True)
class TrainingState:
    """The parts of `FSSDP` that saving and loading need.

    Attributes:
        model: the model; must not be inside a forward or backward pass.
        names: original names in the order of the model's `state_dict()`.
        pools, engine: the pools that hold the experts, and the engine that runs them.
        replica, replicas: index of this device's replica in a (replicate, shard) mesh, and number of replicas; 0 and 1
            without such a mesh.
        masters: values of dense parameters that are saved and loaded instead of the parameters' own, which are coarser.
    """

    model: nn.Module
    names: Sequence[str]
    pools: Sequence[ExpertPool]
    engine: Engine
    replica: int
    replicas: int
    masters: Mapping[nn.Parameter, Tensor]

    @property
    def mesh(self) -> list[Any]:
        """Device type, number of replicas, devices per replica; if these are equal, a resumed run is bit-equal."""
        return [self.pools[0].device.type, self.replicas, self.pools[0].num_devices]

    # Weights and buffers.

    def weights(self) -> dict[str, Entry]:
        """Parameters and buffers, sharing memory with the model.

        Raises:
            ValueError: a module has extra state, which is not a tensor.
        """
        entries = [entry for pool in self.pools for entry in pool.entries()]
        experts = {entry.name: expert_rows(entry, local_tensor(entry.parameter)) for entry in entries}
        dense = self.dense()
        return {name: experts[name] if name in experts else dense[name] for name in self.names}

    def dense(self) -> dict[str, Tensor]:
        """Parameters and buffers other than experts, sharing memory with the model or with `masters`. See `weights`."""
        experts = {entry.name for pool in self.pools for entry in pool.entries()}
        tensors = dense_tensors(self.model, [name for name in self.names if name not in experts])
        named = self.model.named_parameters(remove_duplicate=False)
        masters = {original_name(name): self.masters[p] for name, p in named if p in self.masters}
        return tensors | masters

    def original_names(self) -> dict[Tensor, tuple[list[str], ExpertPool | None]]:
        """Parameter -> the original names it stands for, and its pool if it belongs to one."""
        homes: dict[Tensor, tuple[list[str], ExpertPool | None]] = {
            parameter: ([original_name(name)], None) for name, parameter in self.model.named_parameters()
        }
        for pool in self.pools:
            homes |= {p: ([e.name for e in pool.entries(kind)], pool) for kind, p in pool.parameters.items()}
        return homes

    # Inputs of planning.

    def plans(self) -> dict[str, Tensor]:
        """For each layer: the owner of each expert, and this replica's load history."""
        entries = {}
        for layer in self.engine.layers:
            entries[f"{PLANS}{layer.name}.owners"] = torch.from_numpy(layer.owners.copy())
            for key, value in layer.state().items():
                entries[f"{PLANS}{layer.name}.replica{self.replica}.{key}"] = torch.from_numpy(value)
        return entries

    def plan_keys(self, saved_replicas: int) -> dict[str, dict[str, str]]:
        """Layer -> key of `LayerPlans.state()` or "owners" -> entry name.

        If the number of replicas changed, this replica takes over the state of saved replica
        `replica % saved_replicas`.
        """
        replica = self.replica % saved_replicas
        return {
            layer.name: {key: f"{PLANS}{layer.name}.replica{replica}.{key}" for key in layer.state()}
            | {"owners": f"{PLANS}{layer.name}.owners"}
            for layer in self.engine.layers
        }

    @property
    def cost(self) -> CostModel:
        """The cost model that plans are made with."""
        return self.engine.layers[0].cost.model


def dense_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Parameters and buffers by original name, sharded as the optimizer sees them.

    Args:
        model: the model, not inside a pass. Its `state_dict()` is not used, because that gathers the experts.
        names: names wanted, in the order of the result.

    Raises:
        ValueError: a name is extra state of a module, not a tensor.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass may have left it unsharded
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    tensors = {original_name(key): tensor.detach() for key, tensor in named}
    if extra := [name for name in names if name not in tensors]:
        raise ValueError(
            f"FSSDP: {listed(extra)} of the model's state dict are no parameters or buffers (extra state, say), which "
            "is all that a checkpoint keeps; pass them as `extra`"
        )
    return {name: tensors[name] for name in names}


def expert_rows(entry: OwnedExperts, slots: Tensor) -> ExpertRows:
    """The owned experts of a stacked weight, taken from the pool's local tensor `slots` `[slots, *shape]`."""
    return ExpertRows(entry.of(slots), entry.experts, entry.num_experts)


def compare_names(where: str, saved: Iterable[str], present: Iterable[str], what: str) -> None:
    """ValueError if the two sets of names differ."""
    saved, present = set(saved), set(present)
    parts = []
    if missing := present - saved:
        parts.append(f"lacks {listed(missing)}")
    if extra := saved - present:
        parts.append(f"has {listed(extra)}, which are not here")
    if parts:
        raise ValueError(f"{where}: of the {what}, the checkpoint " + "; it ".join(parts))
