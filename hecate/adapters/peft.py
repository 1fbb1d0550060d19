"""LoRA of peft on stacked experts (`target_parameters`): adapters of an expert become weights of that expert.

peft puts a `ParamWrapper` around the experts module for each parameter that it adapts, one around the other. For E
experts and rank r it keeps the matrices A of all experts in `lora_A.<adapter>.weight [E * r, i]`, where row e * r + k
is row k of expert e, and B in `lora_B.<adapter>.weight [o, r * E]`, where column k * E + e is column k of expert e. Its
forward pass adds `scaling * B A` to the stacked weights before the experts run. Here A and B of an expert are further
kinds of its weights, which have its owner and travel with it, and the expert multiplies by A and then by B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from hecate.experts import Elsewhere, ExpertMLP, ExpertsSpec, WeightSpec
from hecate.names import original_modules
from hecate.ops.grouped import Groups, LowRankSum

__all__ = ["Lora", "adapted", "base_model", "refuse_initial_values", "wrappers_of"]

SUPPORTED = "ParamWrapper"
"""Class name of peft's wrapper."""


def wrappers_of(name: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Adapters around the module `name`, by original name, the innermost first.

    Args:
        name: original name of an experts module.
        modules: all modules of the model by original name.
    """
    found = {}
    outer, _, last = name.rpartition(".")
    while last == "base_layer" and getattr(modules[outer], last, None) is not None:
        found[outer] = modules[outer]
        outer, _, last = outer.rpartition(".")
    return found


def adapted(spec: ExpertsSpec, wrappers: Mapping[str, Any]) -> ExpertsSpec:
    """`spec` with the weights of the adapters and a computation that uses them.

    Args:
        spec: what was found in the experts module itself.
        wrappers: see `wrappers_of`.

    Raises:
        ValueError: adapters of another kind than LoRA, or that Hecate cannot compute as peft does; names the module.
    """
    weights, loras = list(spec.weights), []
    elsewhere: dict[str, Elsewhere] = {}
    for name, wrapper in wrappers.items():
        _refuse(name, wrapper, spec)
        for adapter in wrapper.lora_A:
            lora = Lora.of(wrapper, adapter)
            loras.append(lora)
            for kind, place in lora.places(name, spec.num_experts).items():
                stack = place.stacked(getattr(place.module, place.attribute))
                weights.append(WeightSpec(kind, tuple(stack.shape[1:]), stack.dtype, stack.requires_grad))
                elsewhere[kind] = place
    if not loras:
        return spec
    mlp = LoraMLP(spec.mlp, tuple(loras))
    return replace(spec, weights=tuple(weights), mlp=mlp, gated=None, elsewhere=elsewhere)


def base_model(model: nn.Module) -> nn.Module:
    """The model that peft has put adapters into; `model` itself if it has none."""
    whole: Any = model
    return whole.get_base_model() if hasattr(whole, "peft_config") and hasattr(whole, "get_base_model") else model


def refuse_initial_values(model: nn.Module) -> None:
    """ValueError if `model` has adapters: its own rules would draw their matrices, of which peft sets one to zero."""
    for name, module in original_modules(model).items():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            raise ValueError(
                f"init_weights: {name} has adapters of peft, whose first values are not the model's to choose; give "
                "the base model its values before get_peft_model, or call init_weights(seed, rule) with a rule for them"
            )


def _refuse(name: str, wrapper: Any, spec: ExpertsSpec) -> None:
    """ValueError unless `wrapper` is a LoRA that treats each expert by itself, and that is not merged."""
    kind = type(wrapper).__name__
    if kind != SUPPORTED:
        raise ValueError(f"{name}: {kind} adapts experts; of peft's adapters only LoRA (target_parameters) may")
    parameter = next((w for w in spec.weights if w.kind == wrapper.parameter_name), None)
    what = f"{name}: LoRA on {spec.name}.{wrapper.parameter_name}"
    if parameter is None or len(parameter.shape) != 2:
        shape = None if parameter is None else (spec.num_experts, *parameter.shape)
        raise ValueError(f"{what}, which is {shape}; must be a stack of matrices [experts, rows, columns]")
    if wrapper.merged:
        raise ValueError(f"{what} is merged; call unmerge_adapter before fully_shard")
    used = {
        "bias": any(wrapper.lora_bias.values()),
        "dropout": not all(isinstance(m, nn.Identity) for m in wrapper.lora_dropout.values()),
        "a variant of LoRA (DoRA, say)": bool(wrapper.lora_variant) or any(wrapper.use_dora.values()),
    }
    if wrong := [setting for setting, on in used.items() if on]:
        raise ValueError(f"{what} has {', '.join(wrong)}; on experts only plain LoRA is supported")


@dataclass(frozen=True)
class Lora:
    """One adapter of one stacked weight.

    Attributes:
        wrapper: peft's wrapper.
        adapter: name of the adapter.
        target: kind of the adapted weight.
        a, b: kinds of its matrices, `[E, r, i]` and `[E, o, r]`.
    """

    wrapper: Any
    adapter: str
    target: str
    a: str
    b: str

    @classmethod
    def of(cls, wrapper: Any, adapter: str) -> Lora:
        target = wrapper.parameter_name
        return cls(wrapper, adapter, target, f"{target}_lora_A_{adapter}", f"{target}_lora_B_{adapter}")

    @property
    def active(self) -> bool:
        """Whether peft would add it in a forward pass now."""
        wrapper = self.wrapper
        return not wrapper.disable_adapters and not wrapper.merged and self.adapter in wrapper.active_adapters

    def places(self, name: str, num_experts: int) -> dict[str, Elsewhere]:
        """Where peft keeps the matrices, by kind; `name` is the wrapper's."""
        a, b = self.wrapper.lora_A[self.adapter], self.wrapper.lora_B[self.adapter]
        first, last = f"{name}.lora_A.{self.adapter}.weight", f"{name}.lora_B.{self.adapter}.weight"
        return {
            self.a: Elsewhere(first, a, "weight", partial(_rows, num_experts), _as_rows),
            self.b: Elsewhere(last, b, "weight", partial(_columns, num_experts), _as_columns),
        }

    def added_to(self, weights: Mapping[str, Any]) -> LowRankSum:
        """The adapted weights of the experts whose `weights` are given by kind."""
        a, b = weights[self.a], weights[self.b]
        # peft keeps it from when it made the adapter, by its rule of that version: whether weights are [E, o, i].
        if not getattr(self.wrapper, "_did_swap_in_out_features", False):
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return LowRankSum(weights[self.target], b, a, self.wrapper.scaling[self.adapter])


@dataclass(frozen=True)
class LoraMLP:
    """Experts with adapters: an `ExpertMLP`.

    Attributes:
        mlp: the experts without adapters; must use the adapted weights by `grouped_linear` only.
        loras: the adapters.
    """

    mlp: ExpertMLP
    loras: Sequence[Lora]

    def __call__(self, rows: Tensor, groups: Groups, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs `[N, d]` for `rows` `[N, d]` sorted by expert."""
        used: dict[str, Any] = dict(weights)
        for lora in self.loras:
            if lora.active:
                used[lora.target] = lora.added_to(used)
        return self.mlp(rows, groups, used)


def _rows(num_experts: int, weight: Tensor) -> Tensor:
    return weight.unflatten(0, (num_experts, -1))


def _as_rows(stack: Tensor) -> Tensor:
    return stack.flatten(0, 1)


def _columns(num_experts: int, weight: Tensor) -> Tensor:
    return weight.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def _as_columns(stack: Tensor) -> Tensor:
    return stack.permute(1, 2, 0).flatten(1)
