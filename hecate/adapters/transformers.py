"""The experts interface of transformers >= 5: one seam for all architectures that use it.

`transformers.integrations.moe.use_experts_implementation` decorates an experts module. Its forward takes (hidden
states `[T, d]`, top-k indices `[T, k]`, top-k weights `[T, k]`), and its attributes say how its stacked weights are to
be read: `has_gate`, `has_bias`, `is_transposed`, `has_post_expert_norm`, and the method `_apply_gate` or `act_fn`
between the two products. That is all that is read here, so transformers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from hecate.experts import ExpertMLP
from hecate.ops.grouped import Groups, grouped_bias, grouped_linear

__all__ = [
    "follows_experts_interface",
    "generate_in_step",
    "interface_mlp",
    "interface_weights",
    "refuse_tensor_parallel",
]

DESCRIPTION = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def follows_experts_interface(module: nn.Module) -> bool:
    """Whether `module` carries the attributes that the decorator sets."""
    return all(isinstance(getattr(module, name, None), bool) for name in DESCRIPTION)


def interface_weights(name: str, module: Any) -> tuple[str, ...]:
    """Names of the stacked parameters of such a module.

    Args:
        name: of the module, for the error.
        module: as `follows_experts_interface` accepts.

    Raises:
        ValueError: a weight that the interface promises is not there, or transformers has cut the module for its own
            expert parallelism.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"{name}: transformers holds only a part of its experts here; load the model without a tp_plan"
        )
    first = _first(module)
    names = (first, f"{first}_bias", "down_proj", "down_proj_bias") if module.has_bias else (first, "down_proj")
    if missing := [n for n in names if not isinstance(getattr(module, n, None), nn.Parameter)]:
        raise ValueError(
            f"{name} ({type(module).__name__}): has no parameter {', '.join(missing)}; transformers' experts interface "
            f"asks for {', '.join(names)} where has_gate={module.has_gate} and has_bias={module.has_bias}"
        )
    return names


def refuse_tensor_parallel(model: nn.Module) -> None:
    """ValueError where transformers has split the model itself, by a `tp_plan` or a `DistributedConfig`."""
    for module in model.modules():
        if isinstance(size := getattr(module, "tp_size", None), int) and size > 1:
            raise ValueError(
                f"fully_shard: {type(module).__name__} was loaded with tp_size={size}: tensor parallel training is not "
                "supported; load it without tp_plan and without distributed_config"
            )


def generate_in_step(model: nn.Module) -> None:
    """Let `generate()` run on every rank until the last one has ended, unless `synced_gpus` is given.

    That is its default for models under FSDP, by an attribute that FSDP2 sets and `dense="replicate"` and "none" lack.
    """
    module: Any
    for module in model.modules():
        if callable(getattr(module, "generate", None)):
            module._is_fsdp_managed_module = True
            module._fsdp_use_orig_params = True  # torch.compile asks for it beside the other


def interface_mlp(module: nn.Module) -> ExpertMLP:
    """The experts of such a module as a function of their weights."""
    return partial(_mlp, module)


def _mlp(module: Any, rows: Tensor, groups: Groups, weights: Mapping[str, Tensor]) -> Tensor:
    """`rows` `[N, d]` sorted by expert to `[N, d]`."""
    hidden = _linear(module, rows, groups, weights, _first(module))
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    hidden = _linear(module, hidden, groups, weights, "down_proj")
    return module.post_expert_norm(hidden) if module.has_post_expert_norm else hidden


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _linear(module: Any, rows: Tensor, groups: Groups, weights: Mapping[str, Tensor], kind: str) -> Tensor:
    weight = weights[kind].transpose(1, 2) if module.is_transposed else weights[kind]
    out = grouped_linear(rows, weight, groups)
    return grouped_bias(out, weights[f"{kind}_bias"], groups) if module.has_bias else out
