"""Optimizer state by original parameter names: split by layer and expert for saving, reassembled for loading."""

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
    """The optimizer's state tensors by entry name; the state of a pool is split by layer."""
    entries: dict[str, Entry] = {}
    for parameter, (names, pool) in _homes(state, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                entries |= _cut(names, pool, key, value)
    return entries


def _cut(names: list[str], pool: ExpertPool | None, key: str, value: Tensor) -> dict[str, Entry]:
    """Entry name -> this rank's part of the state tensor `value` of one parameter, which stands for `names`."""
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
    """Everything but tensors, for JSON: parameter groups by original names, other state by original name and key."""
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
    """Names of the settings that every group of this kind of optimizer has."""
    return set(optimizer.defaults) - set(IMPLEMENTATION)


def _plain(what: str, value: Any) -> Any:
    """`value` as JSON can hold it; ValueError if it cannot."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(what, v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"optimizer: {what} is a {type(value).__name__}; only numbers, strings and tensors can be saved")


def _homes(state: TrainingState, optimizer: Optimizer) -> dict[Tensor, tuple[list[str], ExpertPool | None]]:
    """`original_names` of the optimizer's parameters; ValueError if one is not a parameter of the model."""
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
    """An optimizer that a checkpoint is loaded into; its state is not replaced before `commit`.

    Args:
        state: training state of the model.
        optimizer: optimizer of the model's parameters, with or without state.
        record: `optimizer_record` of the saved optimizer.
        saved: the checkpoint's tensors whose names begin with `OPTIMIZER`.

    Raises:
        ValueError: the optimizer is of another kind than the saved one, trains other parameters, or groups them
            differently.
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
        """Original names of the parameters that the optimizer trains."""
        return {name for names, _ in self._homes.values() for name in names}

    def scalars(self) -> dict[str, Tensor]:
        """Empty CPU tensors to read the zero-dimensional state into, by entry name."""
        return {
            key: torch.zeros((), dtype=saved.properties.dtype) for key, saved in self._saved.items() if not saved.size
        }

    def check_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        """ValueError if layers that now share a parameter (a pool) were saved with different values, e.g. of `step`."""
        for parameter, (names, _) in self._homes.items():
            for key in self._keys[parameter]:
                if f"{OPTIMIZER}{names[0]}.{key}" in scalars:
                    _common(key, names, {name: scalars[f"{OPTIMIZER}{name}.{key}"].item() for name in names})

    def prepare(self, scalars: Mapping[str, Tensor]) -> None:
        """Make the tensors to load into and set the scalars. Call it after the pools have their owners."""
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
        """Replace the optimizer's state and settings by the loaded ones."""
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
        """ValueError if the saved optimizer was of another kind, so that the first step would miss its state.

        Kinds are told apart by their settings. Versions may add settings: it is enough if one set contains the other.
        """
        own = _settings(self._optimizer)
        saved = set(self._record.get("settings", own))
        if own - saved and saved - own:
            raise ValueError(
                f"optimizer: {type(self._optimizer).__name__} has settings {listed(own - saved)}, the saved one "
                f"{listed(saved - own)}; must be of the same kind"
            )

    def _check_sizes(self) -> None:
        """ValueError unless the saved state has all experts of each layer of a pool, with equal shapes and dtypes."""
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
        """For each group of the optimizer, the saved settings."""
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
        """The optimizer's present tensor if shape and dtype fit, else zeros with the parameter's layout."""
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
    """Placement of a state tensor of shape `size`, given the placement of its parameter of shape `shape`.

    Sharded like the parameter if the sharded dimension has the same size (e.g. a mean over columns); else replicated.
    """
    rows = isinstance(placement, Shard) and len(size) == len(shape) and size[placement.dim] == shape[placement.dim]
    return placement if rows else Replicate()


def _like(present: Any, value: Any) -> Any:
    """`value` from JSON, converted to the type of `present`, the optimizer's current value."""
    if isinstance(present, Tensor):
        return torch.full_like(present, value)
    return tuple(value) if isinstance(present, tuple) else value


def _common(what: str, names: list[str], values: Mapping[str, Any]) -> Any:
    """The value that all of `names`, which one parameter stands for, have in common; ValueError if they differ."""
    for name in names:
        if values[name] != values[names[0]]:
            raise ValueError(
                f"optimizer: {what} of {names[0]} is {values[names[0]]}, of {name} {values[name]}; experts of one pool "
                "must agree"
            )
    return values[names[0]]
