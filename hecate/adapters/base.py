"""Find the experts modules of a model, and the weights and functions that FSSDP needs from them.

FSSDP takes over the *experts module* of each MoE layer: the module that holds the stacked weights of all experts and
is called as `experts(hidden_states [T, d], top_k_index [T, k], top_k_weights [T, k]) -> [T, d]`. Router, shared
experts and auxiliary loss stay part of the model. An index of -1 means no expert, so each token may have any number of
experts up to k: for top-p routing, expert choice, dropped tokens and padding. Such entries cost nothing, and their
weights are not read.

Two kinds of experts modules are supported:

- a module that defines two members (`OwnExperts`):
  `expert_weights: tuple[str, ...]`, names of the stacked parameters, whose first dimension is the expert, and
  `expert_mlp(rows [N, d], groups, {name: [experts, ...]}) -> [N, d]`, which runs the experts on rows sorted by expert;
- a module that follows the experts interface of transformers (`hecate.adapters.transformers`).

`hecate.stack_experts` makes such a module from a list of equal MLPs.

Everything else in the module (submodules, buffers) stays in it and is treated like any dense part of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from hecate.adapters.peft import adapted, wrappers_of
from hecate.adapters.transformers import (
    DESCRIPTION,
    follows_experts_interface,
    gated_activation,
    interface_mlp,
    interface_weights,
    refuse_own_forward,
    refuse_router,
    refuse_tensor_parallel,
)
from hecate.experts import ExpertMLP, ExpertsSpec, WeightSpec
from hecate.names import original_modules, original_name
from hecate.ops.grouped import Groups
from hecate.text import listed

__all__ = ["FoundExperts", "OwnExperts", "find_experts"]

LOOKS_LIKE_EXPERTS = re.compile(r"(Experts|MoE|Moe|SparseMLP)$")


@runtime_checkable
class OwnExperts(Protocol):
    """An experts module that names its weights and can run on any subset of its experts."""

    expert_weights: tuple[str, ...]

    def expert_mlp(self, x: Tensor, groups: Groups, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs `[N, d]` for rows `x [N, d]` sorted by expert.

        `weights` maps a name to the weights `[experts, ...]` of any subset of the experts; `groups` has the number of
        rows for each of them.
        """
        ...


@dataclass(frozen=True)
class FoundExperts:
    """One MoE layer of a model.

    Attributes:
        parent: the module that holds the experts module.
        module: the experts module.
        spec: its description.
        wrappers: peft's modules around it, the innermost first; `parent` holds the last.
    """

    parent: nn.Module
    module: nn.Module
    spec: ExpertsSpec
    wrappers: tuple[nn.Module, ...] = ()


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """All MoE layers of `model`, in module order.

    Raises:
        ValueError: the model has no MoE layer, or one is not supported; the message says what is missing.
    """
    refuse_tensor_parallel(model)
    found = []
    modules = original_modules(model)
    for name, module in modules.items():
        if (spec := _spec(name, module)) is not None:
            _refuse_replaced_forward(name, module)
            if not name:
                kind = type(module).__name__
                raise ValueError(
                    f"fully_shard: the model itself, {kind}, is an experts module; wrap it in the module that calls it"
                )
            wrappers = wrappers_of(name, modules)
            outer = next(reversed(wrappers), name)
            parent = modules[outer.rpartition(".")[0]]
            refuse_router(outer, parent)
            found.append(FoundExperts(parent, module, adapted(spec, wrappers), tuple(wrappers.values())))
    _refuse_tied(model, found)
    if not found:
        raise ValueError(
            f"fully_shard: {type(model).__name__} has no MoE layer that fits: no submodule has `expert_weights` and "
            f"`expert_mlp` (see hecate.adapters.base) or, as in transformers' experts interface, "
            f"{', '.join(DESCRIPTION)}{_look_alikes(model)}{_lists(model)}"
        )
    return found


def _refuse_tied(model: nn.Module, found: Iterable[FoundExperts]) -> None:
    """ValueError if expert weights are tied: a pool has a separate row for each expert of each layer."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(original_name(name))
    for f in found:
        for weight in f.spec.weights:
            if len(names := places[id(f.spec.parameter(f.module, weight.kind))]) > 1:
                raise ValueError(
                    f"fully_shard: {' and '.join(names)} are one tied parameter; experts must not be tied. Register an "
                    "MoE layer at one place of the model, and call it as often as you like"
                )


def _refuse_replaced_forward(name: str, module: nn.Module) -> None:
    """ValueError if code has set another `forward` on the object, which would be called instead of FSSDP's."""
    if (forward := vars(module).get("forward")) is not None:
        what = getattr(forward, "__qualname__", type(forward).__name__)
        raise ValueError(
            f"{name}: the forward pass of this {type(module).__name__} was replaced by {what}; FSSDP replaces it, too, "
            "and only one can run. Undo that (accelerate does it to models loaded with a device_map)"
        )


def _spec(name: str, module: nn.Module) -> ExpertsSpec | None:
    if isinstance(module, OwnExperts):
        return _spec_of(name, module, module.expert_weights, module.expert_mlp)
    if follows_experts_interface(module):
        refuse_own_forward(name, module)
        mlp, gated = interface_mlp(module), gated_activation(module)
        return _spec_of(name, module, interface_weights(name, module), mlp, gated)
    return None


def _spec_of(
    name: str, module: nn.Module, kinds: tuple[str, ...], mlp: ExpertMLP, gated: str | None = None
) -> ExpertsSpec:
    stacked = {kind: _parameter(name, module, kind) for kind in kinds}
    sizes = {kind: tuple(w.shape) for kind, w in stacked.items()}
    if len({shape[0] for shape in sizes.values()}) != 1:
        raise ValueError(f"{name}: stacked weights {sizes} must have the same number of experts as first dimension")
    for kind, w in stacked.items():
        if not w.dtype.is_floating_point or w.dtype.itemsize == 1:
            raise ValueError(f"{name}.{kind}: dtype {w.dtype} is quantized; must be float64, float32 or bfloat16")
        if hasattr(w, "__tensor_flatten__"):  # a subclass that holds other tensors, such as quantized ones of torchao
            raise ValueError(f"{name}.{kind} is a {type(w).__name__}; must be a plain tensor (not quantized)")
    if rest := sorted({n for n, _ in module.named_parameters(recurse=False)} - stacked.keys()):
        raise ValueError(f"{name}: parameters {rest} belong to no expert; put them into a submodule of {name}")
    weights = tuple(WeightSpec(k, tuple(w.shape[1:]), w.dtype, w.requires_grad) for k, w in stacked.items())
    num_experts = next(iter(sizes.values()))[0]
    return ExpertsSpec(name, num_experts, _width(name, weights), weights, mlp, gated)


def _parameter(name: str, module: nn.Module, kind: str) -> nn.Parameter:
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    if kind in own and own[kind].ndim:
        return own[kind]
    found = getattr(module, kind, None)
    shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
    what = f"a {type(found).__name__}{shape}" if hasattr(module, kind) else "not there"
    raise ValueError(
        f"{name} ({type(module).__name__}): the stacked weight {kind!r} is {what}; must be an nn.Parameter "
        f"[experts, ...] of this module itself, which has {', '.join(own) or 'none'}"
    )


def _width(name: str, weights: tuple[WeightSpec, ...]) -> int:
    matrices = [w.shape for w in weights if len(w.shape) == 2]
    if not matrices:
        raise ValueError(f"{name}: weights {[w.shape for w in weights]} have no matrix [outputs, inputs] an expert")
    return matrices[0][1]


def _lists(model: nn.Module) -> str:
    """Lists of modules whose name says that they are experts, as a hint in the error."""
    lists = {n: m for n, m in original_modules(model).items() if isinstance(m, nn.ModuleList | nn.ModuleDict)}
    found = [f"{n} ({type(m).__name__} of {len(m)})" for n, m in lists.items() if "expert" in n.rpartition(".")[2]]
    if not found:
        return ""
    return f"; {listed(found)} must be one module: hecate.stack_experts makes it from a list of equal MLPs"


def _look_alikes(model: nn.Module) -> str:
    """Modules whose class name suggests experts, the first one of each class, as a hint in the error."""
    kinds: dict[str, str] = {}
    for name, module in original_modules(model).items():
        if LOOKS_LIKE_EXPERTS.search(kind := type(module).__name__):
            kinds.setdefault(kind, f"{name} ({kind}{_lacks(module)})")
    return f"; what looks like one is {', '.join(kinds.values())}" if kinds else ""


def _lacks(module: nn.Module) -> str:
    """What keeps a module with stacked weights from being an experts module of transformers' interface."""
    stacked = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    if not stacked:
        return ""
    missing = [name for name in DESCRIPTION if not hasattr(module, name)]
    return f" with {', '.join(f'{n}{list(s)}' for n, s in stacked.items())}, which lacks {', '.join(missing)}"
