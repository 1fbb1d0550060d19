"""Validity checks of a checkpoint's record and of the planners' saved state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hecate.cost import CostModel

__all__ = ["check_planners", "check_record", "planner_entries"]

Shape = tuple[int | None, ...]
"""Shape of a tensor; None stands for any size."""
MOST = 2**40
"""Upper bound on counts of tokens or copies: more than any real run has, and sums of such counts do not overflow."""


def check_record(where: str, record: Mapping[str, Any]) -> None:
    """ValueError if the content of `hecate.json` is not what `FSSDP.save` writes."""
    mesh = record.get("mesh")
    sizes = mesh[1:] if isinstance(mesh, list) and len(mesh) == 3 and isinstance(mesh[0], str) else []
    _require(where, len(sizes) == 2 and all(type(size) is int and size >= 1 for size in sizes), "mesh", mesh)
    step = record.get("step")
    _require(where, type(step) is int and step >= 0, "step", step)
    try:
        CostModel(**record.get("cost"))  # type: ignore[arg-type]  # TypeError is caught
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: the record has a wrong cost: {error}") from None
    _require(where, isinstance(record.get("extra", {}), dict), "extra", record.get("extra"))
    if record.get("optimizer") is not None:
        _check_optimizer(where, record["optimizer"])


def _check_optimizer(where: str, optimizer: Any) -> None:
    _require(where, isinstance(optimizer, dict), "optimizer", optimizer)
    _require(where, _strings(optimizer.get("settings", [])), "optimizer.settings", optimizer.get("settings"))
    groups, scalars = optimizer.get("groups"), optimizer.get("scalars")
    _require(where, isinstance(groups, list), "optimizer.groups", groups)
    for group in groups:
        right = isinstance(group, dict) and _strings(group.get("names")) and isinstance(group.get("values"), dict)
        _require(where, right, "optimizer.groups", group)
    right = isinstance(scalars, dict) and all(isinstance(values, dict) for values in scalars.values())
    _require(where, right, "optimizer.scalars", scalars)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _require(where: str, right: bool, name: str, value: Any) -> None:
    if not right:
        raise ValueError(f"{where}: the record has {name}={str(value)[:100]}, which FSSDP.save does not write")


def planner_entries(
    where: str,
    saved: Mapping[str, TensorStorageMetadata],
    keys: Mapping[str, Mapping[str, str]],
    experts: Mapping[str, int],
    devices: int,
) -> list[str]:
    """Names of the entries that hold the planners' state; checks that all exist with the right shape and as int64.

    Args:
        where: prefix of error messages.
        saved: tensors of the checkpoint.
        keys: layer -> key of its `LayerPlans.state()` -> entry, see `TrainingState.plan_keys`.
        experts: layer -> its number of experts.
        devices: number of devices that shared the experts when the checkpoint was saved.
    """
    names = []
    for layer, entries in keys.items():
        for key, name in entries.items():
            shape = _shape(key, experts[layer], devices)
            if name not in saved:
                raise ValueError(f"{where}: the checkpoint lacks {name}, of the planner of {layer}")
            size, dtype = saved[name].size, saved[name].properties.dtype
            fits = len(size) == len(shape) and all(want in (None, has) for want, has in zip(shape, size, strict=True))
            if not fits or dtype != torch.int64:
                expected = str(shape).replace("None", "any")
                raise ValueError(f"{where}: {name} has shape {tuple(size)}, {dtype}; must be {expected}, torch.int64")
            names.append(name)
    return names


def _shape(key: str, experts: int, devices: int) -> Shape:
    """Expected shape of one key of `LayerPlanner.state()`, or of "owners"."""
    shapes: dict[str, Shape] = {
        "owners": (experts,),
        "history": (None, devices, experts),
        "since_reshard": (experts,),
        "tokens_per_device": (),
        "slots": (),
    }
    return shapes[key]


def check_planners(
    where: str,
    keys: Mapping[str, Mapping[str, str]],
    values: Mapping[str, Tensor],
    devices: int,
) -> None:
    """ValueError if the planners' state, read from the entries of `keys`, is not valid."""
    for entries in keys.values():
        for key, name in entries.items():
            value = values[name]
            most = devices - 1 if key == "owners" else MOST
            if value.numel() and not 0 <= int(value.min()) <= int(value.max()) <= most:
                low, high = int(value.min()), int(value.max())
                raise ValueError(f"{where}: {name} has values from {low} to {high}; must be within [0, {most}]")
