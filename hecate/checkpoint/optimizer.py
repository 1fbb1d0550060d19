"""An optimizer's state by original parameter names: cut by layer and expert to save, put together again to load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor import zeros as dtensor_zeros
from torch.optim import Optimizer

from hecate.checkpoint.state import Entry, TrainingState, compare_names, expert_rows
from hecate.runtime.experts.optimizer_states import BY_EXPERT
from hecate.runtime.experts.pool import ExpertPool
from hecate.text import listed
from hecate.values.local import local_tensor

__all__ = ["OPTIMIZER", "OptimizerTarget", "optimizer_entries", "optimizer_record"]

OPTIMIZER = "optimizer.state."

# How a step is computed is the run's own choice; everything else in a parameter group is state.
IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable", BY_EXPERT)


def optimizer_entries(state: TrainingState, optimizer: Optimizer) -> dict[str, Entry]:
    """The optimizer's tensors; a pool's are cut into its layers'."""
    entries: dict[str, Entry] = {}
    for parameter, (names, pool) in _homes(state, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                entries |= _cut(names, pool, key, value)
    return entries


def _cut(names: list[str], pool: ExpertPool | None, key: str, value: Tensor) -> dict[str, Entry]:
    """Original key -> what this device has of the state `value` of a parameter."""
    if pool is None or value.ndim == 0:
        return {f"{OPTIMIZER}{name}.{key}": value for name in names}
    slots = local_tensor(value)
    if slots.shape[0] != pool.slots:
        raise ValueError(
            f"optimizer state {key} of {names[0]} has local shape {tuple(slots.shape)}; its first dimension must be "
            f"the {pool.slots} slots of a device to be saved by expert"
        )
    entries = (entry for entry in pool.entries() if entry.name in names)
    return {f"{OPTIMIZER}{entry.name}.{key}": expert_rows(entry, slots) for entry in entries}


def optimizer_record(state: TrainingState, optimizer: Optimizer) -> dict[str, Any]:
    """What is no tensor: parameter groups by original names, and other values by original name and key."""
    homes = _homes(state, optimizer)
    groups = []
    for group in optimizer.param_groups:
        values = {key: _plain(f"{key} of a group", v) for key, v in group.items() if key not in IMPLEMENTATION}
        groups.append({"names": [n for p in group["params"] for n in homes[p][0]], "values": values})
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, (names, _) in homes.items():
        items = optimizer.state.get(parameter, {}).items()
        plain = {key: _plain(f"{key} of {names[0]}", v) for key, v in items if not isinstance(v, Tensor)}
        scalars |= {name: plain for name in names if plain}
    return {"settings": sorted(_settings(optimizer)), "groups": groups, "scalars": scalars}


def _settings(optimizer: Optimizer) -> set[str]:
    """Names of what its kind has in every group."""
    return set(optimizer.defaults) - set(IMPLEMENTATION)


def _plain(what: str, value: Any) -> Any:
    """As JSON keeps it."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(what, v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"optimizer: {what} is a {type(value).__name__}; only numbers, strings and tensors can be saved")


def _homes(state: TrainingState, optimizer: Optimizer) -> dict[Tensor, tuple[list[str], ExpertPool | None]]:
    """`original_names` of the optimizer's parameters; ValueError where one is not the model's."""
    homes, own = state.original_names(), {}
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter not in homes:
                raise ValueError(
                    f"optimizer: parameter {position} of group {number}, shape {tuple(parameter.shape)}, is not of "
                    "this model; make the optimizer after hecate.fully_shard, from model.parameters()"
                )
            own[parameter] = homes[parameter]
    return own


class OptimizerTarget:
    """An optimizer as the place to load a checkpoint into; nothing changes before `commit`.

    Args:
        state: of the model.
        optimizer: of its parameters, with state or fresh.
        record: `optimizer_record` of the one that was saved.
        saved: the checkpoint's tensors whose names begin with `OPTIMIZER`.

    Raises:
        ValueError: it is of another kind than the saved one, trains other parameters, or groups them otherwise.
    """

    def __init__(
        self,
        state: TrainingState,
        optimizer: Optimizer,
        record: dict[str, Any],
        saved: Mapping[str, TensorStorageMetadata],
    ) -> None:
        self._optimizer, self._record, self._saved = optimizer, record, saved
        self._homes = _homes(state, optimizer)
        self._check_kind()
        self._groups = self._match_groups()
        keys = defaultdict(list)
        for entry in sorted(saved):
            name, _, key = entry.removeprefix(OPTIMIZER).rpartition(".")
            keys[name].append(key)
        self._keys = {p: _common("state", names, keys) for p, (names, _) in self._homes.items()}
        self._check_sizes()
        self._state: dict[Tensor, dict[str, Tensor]] = {}

    @property
    def names(self) -> set[str]:
        """Original names that it trains."""
        return {name for names, _ in self._homes.values() for name in names}

    def scalars(self) -> dict[str, Tensor]:
        """Places for the zero-dimensional tensors, on CPU."""
        return {
            key: torch.zeros((), dtype=saved.properties.dtype) for key, saved in self._saved.items() if not saved.size
        }

    def check_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        """ValueError where layers that now share a parameter were at different steps."""
        for parameter, (names, _) in self._homes.items():
            for key in self._keys[parameter]:
                if f"{OPTIMIZER}{names[0]}.{key}" in scalars:
                    _common(key, names, {name: scalars[f"{OPTIMIZER}{name}.{key}"].item() for name in names})

    def prepare(self, scalars: Mapping[str, Tensor]) -> None:
        """Make the tensors to load into, with the scalars in place; after the pools have their owners."""
        for group in self._optimizer.param_groups:
            device_scalars = group.get("capturable") or group.get("fused")
            for parameter in group["params"]:
                names, _ = self._homes[parameter]
                self._state[parameter] = made = {}
                for key in self._keys[parameter]:
                    first = f"{OPTIMIZER}{names[0]}.{key}"
                    if first in scalars:
                        made[key] = scalars[first].clone().to(parameter.device if device_scalars else "cpu")
                    else:
                        made[key] = self._tensor(parameter, key, self._saved[first])

    def entries(self) -> dict[str, Entry]:
        """The prepared tensors by original names."""
        entries: dict[str, Entry] = {}
        for parameter, (names, pool) in self._homes.items():
            for key, value in self._state[parameter].items():
                if value.ndim:
                    entries |= _cut(names, pool, key, value)
        return entries

    def commit(self) -> None:
        """Give the optimizer what was loaded."""
        for parameter, (names, pool) in self._homes.items():
            own: dict[str, Any] = dict(self._state[parameter])
            if pool is not None:
                for value in own.values():
                    if value.ndim:
                        pool.clear_padding(value)
            own |= self._record["scalars"].get(names[0], {})
            self._optimizer.state.pop(parameter, None)
            if own:
                self._optimizer.state[parameter] = own
        for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key, value in values.items():
                group[key] = _like(group.get(key), value)
            if any(self._homes[parameter][1] is not None for parameter in group["params"]):
                group[BY_EXPERT] = False

    def _check_kind(self) -> None:
        """By the settings: state of another kind would be missed in the first step. One side alone may have more."""
        own = _settings(self._optimizer)
        saved = set(self._record.get("settings", own))
        if own - saved and saved - own:
            raise ValueError(
                f"optimizer: {type(self._optimizer).__name__} has settings {listed(own - saved)}, the saved one "
                f"{listed(saved - own)}; must be of the same kind"
            )

    def _check_sizes(self) -> None:
        """ValueError unless a pool's state is of all experts of its layers, in equal shapes and dtypes."""
        for parameter, (names, pool) in self._homes.items():
            if pool is None:
                continue
            for key in self._keys[parameter]:
                saved = {name: self._saved[f"{OPTIMIZER}{name}.{key}"] for name in names}
                _common(f"dtype of {key}", names, {name: s.properties.dtype for name, s in saved.items()})
                _common(f"shape of {key} of an expert", names, {name: tuple(s.size[1:]) for name, s in saved.items()})
                for name, spec in zip(names, pool.specs, strict=True):
                    if saved[name].size and saved[name].size[0] != spec.num_experts:
                        raise ValueError(
                            f"optimizer: {key} of {name} has shape {tuple(saved[name].size)} in the checkpoint; its "
                            f"first dimension must be the {spec.num_experts} experts"
                        )

    def _match_groups(self) -> list[dict[str, Any]]:
        """Saved values of each of the optimizer's groups."""
        saved_group = {name: i for i, g in enumerate(self._record["groups"]) for name in g["names"]}
        compare_names("optimizer", saved_group.keys(), self.names, "trained parameters")
        matched = []
        for number, group in enumerate(self._optimizer.param_groups):
            names = [n for p in group["params"] for n in self._homes[p][0]]
            sources = sorted({saved_group[name] for name in names})
            if len(sources) > 1:
                raise ValueError(
                    f"optimizer: group {number} ({listed(names)}) was {len(sources)} groups when it was saved; "
                    "group the parameters at least as finely"
                )
            matched.append(self._record["groups"][sources[0]]["values"] if sources else {})
        return matched

    def _tensor(self, parameter: Tensor, key: str, saved: TensorStorageMetadata) -> Tensor:
        """The optimizer's own tensor if it fits, else zeros laid out as the parameter is."""
        pool, dtype, size = self._homes[parameter][1], saved.properties.dtype, saved.size
        if pool is not None:
            size = torch.Size((parameter.shape[0], *size[1:]))
        present = self._optimizer.state.get(parameter, {}).get(key)
        if isinstance(present, Tensor) and present.shape == size and present.dtype == dtype:
            return present
        if pool is not None:
            return pool.distribute(torch.zeros(pool.slots, *size[1:], dtype=dtype, device=parameter.device))
        if size == parameter.shape:
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        if not isinstance(parameter, DTensor):
            return torch.zeros(size, dtype=dtype, device=parameter.device)
        placements = [_with_size(p, parameter.shape, size) for p in parameter.placements]
        return dtensor_zeros(size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)


def _with_size(placement: Placement, shape: torch.Size, size: torch.Size) -> Placement:
    """That of a state tensor: sharded where it has the parameter's rows, e.g. a mean over its columns; else whole."""
    rows = isinstance(placement, Shard) and len(size) == len(shape) and size[placement.dim] == shape[placement.dim]
    return placement if rows else Replicate()


def _like(present: Any, value: Any) -> Any:
    """A value from JSON in the type that the optimizer has it in."""
    if isinstance(present, Tensor):
        return torch.full_like(present, value)
    return tuple(value) if isinstance(present, tuple) else value


def _common(what: str, names: list[str], values: Mapping[str, Any]) -> Any:
    """The value of all of `names`, which one parameter of a pool stands for."""
    for name in names:
        if values[name] != values[names[0]]:
            raise ValueError(
                f"optimizer: {what} of {names[0]} is {values[names[0]]}, of {name} {values[name]}; experts of one pool "
                "must agree"
            )
    return values[names[0]]
