"""The experts interface of transformers >= 5: one adapter for all architectures that use it.

`transformers.integrations.moe.use_experts_implementation` decorates an experts module. Its forward takes (hidden
states `[T, d]`, top-k indices `[T, k]`, top-k weights `[T, k]`), and its attributes say how its stacked weights are to
be read: `has_gate`, `has_bias`, `is_transposed`, `has_post_expert_norm`; `_apply_gate` or `act_fn` runs between the two
matrix products. This adapter uses only those members, so it does not import transformers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hecate.adapters.hooks import called_alone
from hecate.experts import ExpertMLP
from hecate.ops.activation import PLAIN as PLAIN_ACTIVATIONS
from hecate.ops.activation import activation
from hecate.ops.grouped import Groups, grouped_bias, grouped_linear
from hecate.ops.kernels.activations import Activation
from hecate.ops.sonicmoe import gated_mlp

__all__ = [
    "cast_constants",
    "follows_experts_interface",
    "fused_activation",
    "gated_activation",
    "generate_in_step",
    "interface_mlp",
    "interface_weights",
    "kept_in_float32",
    "refuse_own_forward",
    "refuse_router",
    "refuse_tensor_parallel",
    "tie_on_meta",
]

DESCRIPTION = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
LATER = {"has_gate": True, "has_post_expert_norm": False}
"""Attributes that early 5.x versions do not set -> the value that describes their modules."""

UNDECORATED = ("Step3p7Experts",)
"""Classes without the decorator, and so without its attributes, whose forward pass is that of the interface."""
PLAIN = {**LATER, "has_bias": False, "is_transposed": False}
"""Attributes -> values that describe the modules of `UNDECORATED`."""

INTERFACE = "transformers.integrations.moe"
"""The module of the decorator, and so of the forward pass that it gives a class."""
DEFAULT_GATE = (INTERFACE, "_default_apply_gate")
"""Module and name of the gate that the decorator gives modules without one of their own."""
ACTIVATIONS: Mapping[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
"""Classes of torch.nn and transformers.activations -> the kernels' names of the same functions."""

CONSTANTS = {"MiniMaxLightningAttention": ("slope_rate", "query_decay", "key_decay", "diagonal_decay")}
"""Class -> buffers that are multiplied with hidden states and must therefore have their dtype.

A model made in bfloat16 has them in bfloat16. A model with float32 weights that computes in bfloat16 has them in
float32, which would turn hidden states into float32. Other buffers stay float32: a router's bias or a rotary frequency
would lose too much precision.
"""


def follows_experts_interface(module: nn.Module) -> bool:
    """Whether `module` carries the attributes that the decorator sets."""
    if type(module).__name__ in UNDECORATED:
        return True
    flags = [getattr(module, name, LATER.get(name)) for name in DESCRIPTION]
    gate = hasattr(module, "has_gate") or callable(getattr(module, "_apply_gate", None))
    return gate and all(isinstance(flag, bool) for flag in flags)


def refuse_own_forward(name: str, module: nn.Module) -> None:
    """ValueError if such a module has a forward pass of its own, which FSSDP would leave out.

    A subclass may override the interface's, and libraries put their own into the class or the object.

    Args:
        name: name of the module, for the error.
        module: a module for which `follows_experts_interface` is true.
    """
    forward: Any = type(module).forward
    by_interface = getattr(forward, "__globals__", {}).get("__name__") == INTERFACE
    if not by_interface and type(module).__name__ not in UNDECORATED:
        raise ValueError(
            f"{name}: the forward pass of {type(module).__name__} is {getattr(forward, '__qualname__', forward)}, not "
            "that of transformers' experts interface; FSSDP would leave out what it adds. Put that into the module "
            "that calls the experts, or define expert_weights and expert_mlp (see hecate.adapters.base)"
        )


def interface_weights(name: str, module: Any) -> tuple[str, ...]:
    """Names of the stacked parameters of such a module.

    Args:
        name: name of the module, for error messages.
        module: a module for which `follows_experts_interface` is true.

    Raises:
        ValueError: a weight that the interface promises is missing, or transformers has already split the module for
            its own expert parallelism.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"{name}: transformers holds only a part of its experts here; load the model without a tp_plan"
        )
    first = _first(module)
    has_bias = _flag(module, "has_bias")
    names = (first, f"{first}_bias", "down_proj", "down_proj_bias") if has_bias else (first, "down_proj")
    if missing := [n for n in names if not isinstance(getattr(module, n, None), nn.Parameter)]:
        raise ValueError(
            f"{name} ({type(module).__name__}): has no parameter {', '.join(missing)}; transformers' experts interface "
            f"asks for {', '.join(names)} where has_gate={_flag(module, 'has_gate')} and has_bias={has_bias}"
        )
    return names


def refuse_tensor_parallel(model: nn.Module) -> None:
    """ValueError if transformers has split the model itself, because of a `tp_plan` or a `DistributedConfig`."""
    for module in model.modules():
        if isinstance(size := getattr(module, "tp_size", None), int) and size > 1:
            raise ValueError(
                f"fully_shard: {type(module).__name__} was loaded with tp_size={size}: tensor parallel training is not "
                "supported; load it without tp_plan and without distributed_config"
            )


def refuse_router(name: str, layer: nn.Module) -> None:
    """ValueError if a layer's router gives experts one weight per expert of the layer, instead of one per choice.

    phimoe's does in transformers 5.0, whose own experts then read the weights of other experts.

    Args:
        name: name of the layer's experts module, for the error.
        layer: the module that holds it and the router.
    """
    for child, router in layer.named_children():
        if type(router).__name__.endswith("TopKRouter") and not hasattr(router, "top_k"):
            raise ValueError(
                f"{name}: its router {child} ({type(router).__name__}) has no top_k, so its weights are "
                "[tokens, experts]; experts need those of the chosen ones, [tokens, top_k]; use a newer transformers"
            )


def kept_in_float32(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that transformers keeps in float32 when the model is bfloat16, mostly those of routers.

    The model's forward pass may rely on that and pass them float32 inputs.
    """
    kept = set()
    for module in model.modules():
        patterns = [p.replace("*", ".*") for p in getattr(module, "_keep_in_fp32_modules_strict", None) or ()]
        for name, parameter in module.named_parameters() if patterns else ():
            if any(re.search(pattern, name) for pattern in patterns):
                kept.add(parameter)
    return kept


def tie_on_meta(model: nn.Module) -> None:
    """Tie parameters on the meta device that the model's class ties, e.g. the output head's to the embedding.

    Up to some 5.x, transformers ties those of a model that was built on the meta device only in `from_pretrained`.
    """
    module: Any
    for module in model.modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        if not isinstance(tied, dict) or not callable(getattr(module, "tie_weights", None)):
            continue
        named = dict(module.named_parameters(remove_duplicate=False))
        pairs = [(named.get(target), named.get(source)) for target, source in tied.items()]
        if any(one is not other and one is not None and one.is_meta for one, other in pairs):
            module.tie_weights()


class _Constants:
    """Casts buffers of one module to another dtype during its forward pass."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
        self._names, self._dtype = names, dtype
        self._own: dict[str, Tensor] = {}
        module.register_forward_pre_hook(self._cast)
        module.register_forward_hook(self._restore, always_call=True)

    def _cast(self, module: nn.Module, args: object) -> None:
        self._own = {name: module.get_buffer(name) for name in self._names}
        for name, buffer in self._own.items():
            setattr(module, name, buffer.to(self._dtype))

    def _restore(self, module: nn.Module, args: object, output: object) -> None:
        for name, buffer in self._own.items():
            setattr(module, name, buffer)
        self._own = {}


def cast_constants(model: nn.Module, dtype: torch.dtype) -> None:
    """Make modules run with their `CONSTANTS` in `dtype`, the dtype they compute in. Call before sharding."""
    for module in model.modules():
        if names := CONSTANTS.get(type(module).__name__):
            _Constants(module, names, dtype)


def generate_in_step(model: nn.Module) -> None:
    """Make `generate()` by default run on every rank until all ranks have finished (`synced_gpus`).

    Forward passes are collective. transformers has that default for models under FSDP, which it recognizes by an
    attribute that FSDP2 sets; it is set here for `dense="replicate"` and "none".
    """
    module: Any
    for module in model.modules():
        if callable(getattr(module, "generate", None)):
            module._is_fsdp_managed_module = True
            module._fsdp_use_orig_params = True  # torch.compile reads it if the other is set


def interface_mlp(module: nn.Module) -> ExpertMLP:
    """The module's expert computation as a function of rows, groups and weights."""
    return partial(_mlp, module)


def _mlp(module: Any, rows: Tensor, groups: Groups, weights: Mapping[str, Tensor]) -> Tensor:
    """Outputs `[N, d]` of the experts for `rows` `[N, d]` sorted by expert."""
    if groups.gemm == "sonicmoe" and groups.num_rows and (whole := gated_activation(module)) is not None:
        stacks = (_stack(module, weights, "gate_up_proj"), _stack(module, weights, "down_proj"))
        biases = (weights.get("gate_up_proj_bias"), weights.get("down_proj_bias"))
        return gated_mlp(rows, groups, whole, *stacks, biases)
    hidden = _linear(module, rows, groups, weights, _first(module))
    hidden = _activated(module, hidden, groups.kernels)
    hidden = _linear(module, hidden, groups, weights, "down_proj")
    return module.post_expert_norm(hidden) if _flag(module, "has_post_expert_norm") else hidden


def _activated(module: Any, hidden: Tensor, by_kernels: bool) -> Tensor:
    """What runs between the two products: the module's own code, or the same function in less time."""
    gated = _flag(module, "has_gate")
    kind = fused_activation(module)
    if kind is not None and (by_kernels or not _by_formula(module.act_fn)):
        return activation(hidden, kind, gated, by_kernels)
    return module._apply_gate(hidden) if gated else module.act_fn(hidden)


def _by_formula(act: Any) -> bool:
    """Whether an activation computes GELU by its formula, as transformers' "gelu_python", which rounds otherwise."""
    return inspect.ismethod(getattr(act, "act", None))


def fused_activation(module: Any) -> Activation | None:
    """The kernels' name for what an experts module runs between its two products; None: they have no such function.

    Gated modules must have the interface's own gate, which activates the first half and multiplies it with the second.
    """
    gate = getattr(getattr(module, "_apply_gate", None), "__func__", None)
    own_gate = (getattr(gate, "__module__", ""), getattr(gate, "__name__", ""))
    if _flag(module, "has_gate") and own_gate != DEFAULT_GATE:
        return None
    if not isinstance(module.act_fn, nn.Module):  # some models store a function
        return "silu" if module.act_fn is PLAIN_ACTIVATIONS["silu"] else None
    return _of_class(module.act_fn)


def _of_class(act: Any) -> Activation | None:
    """The kernels' name for an activation module, if it is one of PyTorch's or transformers' as these wrote it."""
    kind = type(act)
    known = kind.__module__ == "transformers.activations" or kind.__module__.startswith("torch.nn.")
    own_forward = kind.forward.__module__ == kind.__module__  # a library may have put another into the class
    if not known or not own_forward or not called_alone(act):
        return None
    if kind is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return ACTIVATIONS.get(kind.__name__)


def gated_activation(module: Any) -> Activation | None:
    """The activation of a module that computes `down(act(gate) * up)` and nothing else; None of another."""
    whole = _flag(module, "has_gate") and not _flag(module, "has_post_expert_norm")
    return fused_activation(module) if whole else None


def _first(module: Any) -> str:
    return "gate_up_proj" if _flag(module, "has_gate") else "up_proj"


def _flag(module: Any, name: str) -> bool:
    """One of the attributes `DESCRIPTION`, which not all modules have; see `LATER` and `PLAIN`."""
    return bool(getattr(module, name, PLAIN[name]))


def _stack(module: Any, weights: Mapping[str, Tensor], kind: str) -> Tensor:
    """The matrices `[experts, outputs, inputs]`."""
    return weights[kind].transpose(1, 2) if _flag(module, "is_transposed") else weights[kind]


def _linear(module: Any, rows: Tensor, groups: Groups, weights: Mapping[str, Tensor], kind: str) -> Tensor:
    out = grouped_linear(rows, _stack(module, weights, kind), groups)
    return grouped_bias(out, weights[f"{kind}_bias"], groups) if _flag(module, "has_bias") else out
