"""What `hecate.verify` refuses before anything runs, and what it resolves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import nn

from hecate.config import FSSDPConfig, PolicyName

__all__ = ["TOLERANCES", "check_input", "in_one_precision", "resolve_policies", "tolerance_of"]

TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative error that counts as equal, by the coarsest dtype that is computed in. Below float64 a rounding
difference may send a token to another expert: that is a larger error, and is reported."""

PRECISION = ("master_dtype", "param_dtype", "reduce_dtype", "wire_dtype")


def check_input(
    functions: Mapping[str, Callable[..., Any]],
    numbers: Mapping[str, int],
    config: FSSDPConfig,
    dtype: torch.dtype | None,
    max_norm: float,
    tolerance: float | None,
) -> None:
    """Check the arguments, without calling the functions among them.

    Raises:
        TypeError, ValueError: names the argument, its value and the rule.
    """
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"verify: {name}={function!r}: must be a function")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"verify: {name}={number!r}: must be an integer >= 1")
    if not isinstance(config, FSSDPConfig):
        raise TypeError(f"verify: config={config!r}: must be a hecate.FSSDPConfig")
    if config.dense == "none":
        raise ValueError("verify: config.dense='none' leaves the dense part to you; must be 'fsdp' or 'replicate'")
    if dtype is not None and dtype not in TOLERANCES:
        raise ValueError(f"verify: dtype={dtype!r}: must be None or one of {', '.join(map(str, TOLERANCES))}")
    for name, value in (("max_norm", max_norm), ("tolerance", tolerance)):
        if value is not None and not value > 0:
            raise ValueError(f"verify: {name}={value!r}: must be > 0")


def resolve_policies(policies: Sequence[PolicyName] | None, config: FSSDPConfig) -> tuple[PolicyName, ...]:
    """`policies`, or by default the configured one and Hecate's own three. ValueError for none or an unknown one."""
    valid = get_args(PolicyName)
    if policies is None:
        return tuple(dict.fromkeys((config.policy, "balanced", "hecate", "ep")))
    if isinstance(policies, str) or not policies or any(policy not in valid for policy in policies):
        raise ValueError(f"verify: policies={policies!r}: must be at least one of {', '.join(map(repr, valid))}")
    return tuple(policies)


def in_one_precision(config: FSSDPConfig, dtype: torch.dtype | None) -> tuple[FSSDPConfig, tuple[str, ...]]:
    """The config, without its own dtypes if everything is computed in `dtype`; and notes that say so."""
    asked = [name for name in PRECISION if getattr(config, name) is not None]
    if dtype is None or not asked:
        return config, ()
    named = ", ".join(f"{name}={getattr(config, name)}" for name in asked)
    note = f"config.{named} not used: everything is computed in {dtype}; dtype=None compares in the model's own"
    plain: dict[str, Any] = dict.fromkeys(asked)
    return replace(config, **plain), (note,)


def tolerance_of(model: nn.Module, config: FSSDPConfig) -> float:
    """The tolerance for the coarsest dtype of weights, compute and exchange."""
    used = {p.dtype for p in model.parameters() if p.is_floating_point()}
    used |= {value for name in PRECISION if (value := getattr(config, name)) is not None}
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in used)
