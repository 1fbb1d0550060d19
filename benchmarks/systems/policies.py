"""Hecate itself, with any policy and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import numpy as np

import hecate
from benchmarks.systems.base import System, Task
from hecate.config import PolicyName

__all__ = ["hecate_policy", "is_policy", "policy_settings"]


def is_policy(name: str) -> bool:
    """Whether `name` begins with the name of a policy."""
    return name.split(":")[0] in get_args(PolicyName)


def policy_settings(name: str) -> dict[str, str | int | float | bool]:
    """Settings in "NAME:KEY=VALUE:KEY=VALUE"; values are integers, floats, true, false or words."""
    policy, *changes = name.split(":")
    pairs = [change.partition("=") for change in changes]
    return {"policy": policy} | {key: _value(text) for key, _, text in pairs}


def _value(text: str) -> str | int | float | bool:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def hecate_policy(name: str, task: Task) -> System:
    """A model under `hecate.fully_shard`; see `policy_settings`. ValueError for a setting that does not exist."""
    changes = policy_settings(name)
    try:
        config = replace(task.settings.fssdp, **changes)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"system {name!r}: {error}") from error
    engine = hecate.fully_shard(task.build(), task.world.mesh, config)

    def figures() -> Mapping[str, float]:
        layers = engine.stats()["layers"]
        return {
            "imbalance_before": float(np.mean([layer["imbalance_before"] for layer in layers])),
            "imbalance_after": float(np.mean([layer["imbalance_after"] for layer in layers])),
            "copies": sum(layer["copies"] for layer in layers),
            "crossings": sum(layer["crossings"] for layer in layers),
            "bytes_copied": sum(layer["bytes"] for layer in layers),
            "exposed_experts": sum(layer["exposed_seconds"] for layer in layers),
        }

    return System(
        task, engine.model, engine.clip_grad_norm_, figures, lambda: engine.stats()["memory_bytes"], engine.close
    )
