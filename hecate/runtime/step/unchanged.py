"""Checks that the model is still the one that was sharded.

Users may add adapters, convert dtypes or resize embeddings after `fully_shard`, which does not work.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hecate.experts import POOL_PREFIX
from hecate.names import original_name
from hecate.runtime.experts.pool import ExpertPool
from hecate.text import listed

__all__ = ["Unchanged"]


class Unchanged:
    """Compares the model with what it was after `fully_shard`.

    Dtype and device of the pools are compared at every check; names and shapes of all other parameters only after a
    submodule was registered. Wrappers that keep the parameters (torch.compile, activation checkpointing) are allowed.

    Args:
        model: the sharded model.
        pools: the pools of its experts.
    """

    def __init__(self, model: nn.Module, pools: Sequence[ExpertPool]) -> None:
        self._model = weakref.ref(model)
        self._pools = tuple(pools)
        self._types = {id(p): (p.dtype, p.device) for pool in pools for p in pool.parameters.values()}
        self._parameters = _described(model)
        self._modules = weakref.WeakSet(model.modules())
        self._suspect = False
        _watch(self)

    def registered(self, module: nn.Module) -> None:
        """Called whenever a submodule is registered on `module`, which may be part of any model."""
        self._suspect = self._suspect or module in self._modules

    def check(self) -> None:
        """Raise if the model was changed. Call between passes.

        Raises:
            RuntimeError: parameters were added, removed or converted; the message names them.
        """
        for pool in self._pools:
            for kind, parameter in pool.parameters.items():
                self._check_type(f"{pool.specs[0].name}.{kind}", parameter)
        model = self._model()
        if self._suspect and model is not None:
            self._suspect = False
            self._check_parameters(model)
            self._modules = weakref.WeakSet(model.modules())

    def _check_type(self, name: str, parameter: nn.Parameter) -> None:
        dtype, device = self._types[id(parameter)]
        if (parameter.dtype, parameter.device) != (dtype, device):
            raise RuntimeError(
                f"fully_shard: {name} is {parameter.dtype} on {parameter.device}, it was {dtype} on {device} when the "
                "model was sharded; convert the model before hecate.fully_shard, or set FSSDPConfig.param_dtype"
            )

    def _check_parameters(self, model: nn.Module) -> None:
        present = _described(model)
        changes = {
            "added": present.keys() - self._parameters.keys(),
            "removed": self._parameters.keys() - present.keys(),
            "given another shape": {n for n, p in present.items() if self._parameters.get(n, p) != p},
        }
        said = [f"{listed(names)} were {what}" for what, names in changes.items() if names]
        if said:
            self._suspect = True
            raise RuntimeError(
                f"fully_shard: after it, {'; '.join(said)}; change the model (adapters, embeddings, heads) before "
                "hecate.fully_shard, then make the optimizer"
            )


def _described(model: nn.Module) -> dict[str, torch.Size]:
    """Original name -> shape of the whole parameter."""
    named = ((original_name(n), p) for n, p in model.named_parameters())
    return {name: p.shape for name, p in named if not name.startswith(POOL_PREFIX)}


_alive: weakref.WeakSet[Unchanged] = weakref.WeakSet()
"""torch's hook on module registration is global, so one hook serves all engines. It keeps no model alive."""


def _watch(unchanged: Unchanged) -> None:
    _hook_once()
    _alive.add(unchanged)


@cache
def _hook_once() -> None:
    def registered(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        for unchanged in list(_alive):
            unchanged.registered(module)

    register_module_module_registration_hook(registered)
