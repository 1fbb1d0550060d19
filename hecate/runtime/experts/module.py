"""State dict entries of an experts module under FSSDP, whose stacked weights are in a pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hecate.experts import ExpertsSpec
from hecate.ranks.agree import gather, rank_and_world
from hecate.ranks.messages import broadcast
from hecate.runtime.experts.by_expert import experts_of, misfit, rows_of
from hecate.runtime.experts.layer import LayerExperts
from hecate.values.local import local_tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ExpertsModule", "InPool", "WeightModule", "take_experts"]

MISSING = "is missing"


@dataclass(frozen=True)
class InPool:
    """Attribute value of a stacked weight that is in a pool. It is no tensor, so that nothing can compute with it.

    The attribute exists because `torch.distributed.checkpoint` looks up each key of a state dict by attribute; it does
    not use the value.

    Attributes:
        name: original name of the weight.
        shape: `[num_experts, *shape]`.
        dtype: dtype of the master weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class ExpertsModule(nn.Module):
    """Puts the stacked weights, which are in a pool, into `state_dict()`, and loads them in `load_state_dict()`.

    Entries have the original names and shapes `[num_experts, *shape]`. Each is a DTensor, Shard(0), in the order of
    expert ids regardless of owners; without a mesh it is a plain tensor.

    Attributes:
        hecate_index: index of the layer.
        hecate_spec: what an adapter found in the layer.
        hecate_kinds: attributes of this module -> their kind in the pool.
    """

    _hecate_experts: list[LayerExperts]
    hecate_index: int
    hecate_spec: ExpertsSpec
    hecate_kinds: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        """An `InPool` if `name` is a stacked weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self.__dict__.get("hecate_kinds", ()):
                raise
        spec = self.hecate_spec
        weight = next(w for w in spec.weights if w.kind == self.hecate_kinds[name])
        dtype = self._hecate_storage.pool.parameters[weight.kind].dtype
        return InPool(spec.name_of(weight.kind), (spec.num_experts, *weight.shape), dtype)

    @classmethod
    def take(cls, module: nn.Module, index: int, spec: ExpertsSpec, kinds: Mapping[str, str]) -> Self:
        """Change the class of `module` in place, as FSDP2's `fully_shard` does, to a subclass of both classes.

        The module keeps its name, submodules and attributes; the weights `kinds`, which the pool has copied, are freed.
        """
        for name in kinds:
            delattr(module, name)
        own = type(module)
        module.__class__ = type(f"FSSDP{own.__name__}", (cls, own), {})
        assert isinstance(module, cls)
        module.hecate_index, module.hecate_spec, module.hecate_kinds = index, spec, kinds
        module.register_load_state_dict_pre_hook(take_experts)
        return module

    def stand_in(self, name: str, parameter: Tensor) -> None:
        """Have a parameter of its own again at the attribute of a stacked weight, until it is deleted."""
        kinds, self.hecate_kinds = self.hecate_kinds, {}  # `setattr` refuses a name that is answered to already
        setattr(self, name, parameter)
        self.hecate_kinds = kinds

    def keep(self, experts: LayerExperts) -> None:
        """Remember `experts`, which hold the weights."""
        self._hecate_experts = [experts]  # in a list, so that nn.Module does not look into it

    def owned_weights(self) -> dict[str, Tensor]:
        """Views kind -> `[owned, *shape]` of the weights that this device owns, outside autograd."""
        return self._hecate_storage.pool.weights_of(self._hecate_storage.place)

    @property
    def _hecate_storage(self) -> LayerExperts:
        return self._hecate_experts[0]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Override torch's method, as its documentation allows. Collective, unless owners are in the order of entries.

        With `keep_vars`, entries are part of the autograd graph: their gradients go to the pool's parameters.
        """
        layer = self._hecate_storage
        layer.watch.forget()  # entries may share memory with the weights, and be written to
        with layer.comms.guard(), torch.set_grad_enabled(keep_vars):
            for name, kind in self.hecate_kinds.items():
                parameter: Tensor = layer.pool.parameters[kind]
                slots = parameter if keep_vars else parameter.detach()
                slots = slots.to_local() if isinstance(slots, DTensor) else slots
                rows = slots[layer.pool.rows(layer.place)]
                destination[prefix + name] = experts_of(rows, layer.owners, layer.pool.mesh, layer.comms.experts)
        super()._save_to_state_dict(destination, prefix, keep_vars)


class WeightModule(ExpertsModule):
    """A module outside the experts module that had weights of the experts (`hecate.experts.Elsewhere`)."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train these weights or not, of all layers of the pool."""
        for kind in self.hecate_kinds.values():
            self._hecate_storage.pool.parameters[kind].requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)


def take_experts(
    module: ExpertsModule,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Pre-hook of `load_state_dict`: load the entries of `module` into the pool. Collective.

    An entry that does not fit on one rank is loaded on none. Problems are appended to `missing_keys` and `error_msgs`,
    as `load_state_dict` does for parameters.
    """
    layer = module._hecate_storage
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    entries = {name: state_dict.pop(prefix + name, None) for name in module.hecate_kinds}
    entries = {name: _stacked(module, name, entry) for name, entry in entries.items()}
    with layer.comms.guard():
        everyone = gather({name: _look_at(module, name, entry, assign) for name, entry in entries.items()})
        for name, entry in entries.items():
            kind, found = module.hecate_kinds[name], [by_name[name] for by_name in everyone]
            if all(f == found[0] for f in found) and found[0].problem is None:
                _load(layer, kind, entry)
            elif _only_on_rank_0(found):
                _load(layer, kind, _from_rank_0(getattr(module, name), entry, layer.pool.device))
            elif found[rank_and_world()[0]].problem == MISSING:
                missing_keys.append(prefix + name)
            else:
                error_msgs.append(f"{prefix}{name} {_difference(found)}; it was loaded on no rank.")


def _stacked(module: ExpertsModule, name: str, entry: Tensor | None) -> Tensor | None:
    """`entry` as a stack, if it has the shape in which the model itself keeps the weight; else unchanged."""
    place = module.hecate_spec.elsewhere.get(module.hecate_kinds[name])
    if place is None or not isinstance(entry, Tensor) or isinstance(entry, DTensor):
        return entry
    kept = place.as_kept(torch.empty(getattr(module, name).shape, device="meta")).shape
    return place.stacked(entry) if entry.shape == kept else entry


@dataclass(frozen=True)
class _Found:
    """What a rank found in its state dict for one weight.

    Attributes:
        problem: why it cannot be loaded; None if it can.
        whole: whether it is a plain tensor of all experts.
    """

    problem: str | None
    whole: bool


def _look_at(module: ExpertsModule, name: str, entry: Tensor | None, assign: bool) -> _Found:
    if entry is None:
        return _Found(MISSING, whole=False)
    weight: InPool = getattr(module, name)
    problem = misfit(entry, torch.Size(weight.shape), module._hecate_storage.pool.mesh)
    if problem is None and assign and entry.dtype != weight.dtype:
        problem = f"has dtype {entry.dtype}; with assign=True, which experts only copy, it must be {weight.dtype}"
    return _Found(problem, whole=not isinstance(entry, DTensor))


def _difference(found: list[_Found]) -> str:
    """Why an entry cannot be loaded, and the ranks that say so."""
    for rank, f in enumerate(found):
        if f.problem is not None:
            return f"{f.problem} on rank {rank}"
    kinds = [f"a {'plain tensor' if f.whole else 'DTensor'} on rank {rank}" for rank, f in enumerate(found)]
    return f"is {', '.join(kinds)}; must be alike on all"


def _only_on_rank_0(found: list[_Found]) -> bool:
    """Whether only rank 0 has the entry, as a plain tensor.

    DCP's option `broadcast_from_rank0` broadcasts only parameters and buffers of modules, so it leaves these entries on
    rank 0, and `load_state_dict` would fail on all other ranks.
    """
    return len(found) > 1 and found[0] == _Found(None, whole=True) and all(f.problem == MISSING for f in found[1:])


def _from_rank_0(weight: InPool, entry: Tensor | None, device: torch.device) -> Tensor:
    """Broadcast an entry that only rank 0 has. Collective.

    Args:
        weight: gives shape and dtype.
        entry: the entry on rank 0, None elsewhere.
        device: device of the result.
    """
    whole = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    if entry is not None:
        whole.copy_(entry.detach())
    broadcast(whole)
    return whole


@torch.no_grad()
def _load(layer: LayerExperts, kind: str, entry: Tensor) -> None:
    pool = layer.pool
    rows = rows_of(entry, layer.owners, pool.rank, pool.mesh, layer.comms.experts)
    local_tensor(pool.parameters[kind])[pool.rows(layer.place)].copy_(rows)
