"""`model.state_dict()` and `load_state_dict()` with entries per experts module instead of pools.

Each experts module adds the entries of its own weights (`hecate.runtime.experts.module`), so that the state dict of a
part of the model, or of a module around it, has them too. This module handles what concerns the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from hecate.experts import POOL_PREFIX
from hecate.names import original_name
from hecate.runtime.experts.module import ExpertsModule

__all__ = ["hide_pools"]


def hide_pools(model: nn.Module, before: Callable[[], None], loaded: Callable[[set[str]], None]) -> None:
    """Leave the pools' parameters out of the state dicts of `model`; the experts modules have their own entries.

    Args:
        model: module on which the pools' parameters are registered.
        before: called before a state dict is made or loaded.
        loaded: called with the original names in the state dict that is about to be loaded.
    """

    def before_loading(
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before()
        _name_as_here(module, state_dict, prefix)
        loaded({original_name(key.removeprefix(prefix)) for key in state_dict if key.startswith(prefix)})
        for name, parameter in _pools(module):
            # torch.distributed.checkpoint adds entries of the pool parameters themselves; loading these changes
            # nothing. Any other value for a pool is unexpected.
            if state_dict.get(prefix + name, parameter) is not parameter:
                unexpected_keys.append(prefix + name)
            state_dict[prefix + name] = parameter

    model.register_state_dict_pre_hook(lambda module, prefix, keep_vars: before())
    model.register_state_dict_post_hook(_without_pools)
    model.register_load_state_dict_pre_hook(before_loading)


def _pools(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters(recurse=False) if name.startswith(POOL_PREFIX))


def _without_pools(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, _ in _pools(model):
        del state_dict[prefix + name]


def _name_as_here(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename entries of compiled experts to their names in this model, which have torch.compile's prefix.

    DCP removes that prefix from all keys, and restores it only for parameters that it finds in modules; an experts
    module has no parameters.
    """
    for key, module in model.named_modules():
        if not isinstance(module, ExpertsModule):
            continue
        here = key.replace("_checkpoint_wrapped_module.", "")  # those wrappers remove it from the keys
        for kind in module.hecate_kinds:
            original = f"{prefix}{original_name(key)}.{kind}"
            if f"{prefix}{here}.{kind}" not in state_dict and original in state_dict:
                state_dict[f"{prefix}{here}.{kind}"] = state_dict.pop(original)
