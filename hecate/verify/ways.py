"""The ways of training under Hecate that are compared with the plain run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from hecate.config import FSSDPConfig, PolicyName
from hecate.policies import get_policy

__all__ = ["Recompute", "Way", "offered_recomputation", "ways"]

SLOTS = 2
"""Memory slots in the ways that copy as much as they can, if the config leaves them to "auto"."""

Recompute = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Way:
    """One way of training the same steps.

    Attributes:
        name: in the report.
        config: settings for `fully_shard`.
        recompute: switch activation checkpointing on.
        no_sync: reduce the dense part's gradients in the last micro-batch of a step only.
        evaluate: evaluate between forward and backward passes and between steps.
        reload: after half of the steps save, and go on with a new engine that has loaded it.
    """

    name: str
    config: FSSDPConfig
    recompute: bool = False
    no_sync: bool = False
    evaluate: bool = False
    reload: bool = False


def ways(config: FSSDPConfig, policies: Sequence[PolicyName], recompute: bool) -> Iterator[Way]:
    """First `config` as it is; then each policy, then each use of it, copying and moving as much as it can.

    Args:
        config: the user's.
        policies: one way per policy; all further ways use the first policy.
        recompute: whether the model can recompute activations.
    """
    yield Way("as configured", config)
    slots = SLOTS if config.memory_slots == "auto" else config.memory_slots
    quiet = replace(config, policy="balanced", reshard_interval=0)  # which not all policies allow
    busy = replace(quiet, max_imbalance=1.0, calibrate="always", memory_slots=slots)
    for policy in policies:
        chosen = get_policy(policy)
        # Without copies, owners are all that it can change, and copies that stay change at the same time.
        interval = 0 if chosen.copies and not chosen.keeps else 1
        yield Way(f"policy {policy}", replace(busy, policy=policy, reshard_interval=interval))
    moving = replace(busy, policy=policies[0], reshard_interval=1)
    yield Way("re-sharding", moving)
    yield Way("rematerialize", replace(moving, rematerialize=True))
    if recompute:
        yield Way("recomputation", moving, recompute=True)
    yield Way("no_sync", moving, no_sync=True)
    yield Way("evaluation", moving, evaluate=True)
    yield Way("save and load", moving, reload=True)
    everything = replace(moving, rematerialize=True)
    yield Way("all of these", everything, recompute=recompute, no_sync=True, evaluate=True, reload=True)


def offered_recomputation(model: nn.Module) -> Recompute | None:
    """How to switch on activation checkpointing: as transformers' models do, else of the units that the model names in
    `_no_split_modules`; None if it offers neither.
    """
    if getattr(model, "supports_gradient_checkpointing", False):
        return lambda model: _enable(model)
    units = getattr(model, "_no_split_modules", None) or ()
    if any(type(module).__name__ in units for module in model.modules()):
        return lambda model: _checkpoint_units(model, units)
    return None


def _enable(model: Any) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _checkpoint_units(model: nn.Module, units: Sequence[str]) -> None:
    for module in model.modules():
        if type(module).__name__ in units:
            module.forward = _checkpointed(module.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
