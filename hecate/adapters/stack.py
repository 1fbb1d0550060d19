"""`stack_experts`: one experts module that FSSDP takes, from a list of equal MLPs as hand-written models have it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hecate.adapters.hooks import called_alone
from hecate.ops.grouped import Groups, grouped_bias, grouped_linear
from hecate.ops.plain import run_experts

__all__ = ["StackedExperts", "stack_experts"]


def stack_experts(module: nn.ModuleList | nn.ModuleDict) -> StackedExperts:
    """Stack the weights of a list of MLPs, so that `hecate.fully_shard` can distribute them.

    Call the result as `experts(hidden [T, d], top_k_index [T, k], top_k_weights [T, k])`; it returns the weighted sum
    of the outputs of each token's experts, `[T, d]`. Index i is the i-th MLP, -1 none. The MLPs' own forward pass
    computes all rows at once, so it must treat each row by itself; `nn.Linear` is replaced by grouped products, all
    else (activations, gates, dropout, train and eval mode) works as written.

    Until `fully_shard`, state dicts have the names of the list, e.g. `experts.0.up.weight`, and `load_state_dict`
    always takes these names. Under FSSDP, `model.state_dict()` and checkpoints have stacked entries, e.g.
    `experts.up_weight`, which `load_state_dict` also takes without FSSDP; `FSSDP.full_state_dict()` has the names of
    the list.

    Args:
        module: at least one MLP, all of the same class and settings; their parameters are all those of `nn.Linear`.

    Raises:
        ValueError: the MLPs differ, have parameters or buffers outside of `nn.Linear`, or hooks, which would be lost;
            names them.
    """
    keys, mlps = list(dict(module.named_children())), list(module.children())
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or not mlps:
        kind = type(module).__name__
        raise ValueError(f"stack_experts: {kind} of {len(mlps)}; must be a ModuleList or ModuleDict of MLPs")
    _check_linear(keys[0], mlps[0])
    _check_hooks(module)
    for key, mlp in zip(keys, mlps, strict=True):
        for what, ours in _description(mlp).items():
            first = _description(mlps[0]).get(what)
            if ours != first:
                raise ValueError(
                    f"stack_experts: {what} is {first} of MLP {keys[0]} and {ours} of MLP {key}; the MLPs must be "
                    "equal but for the values of their weights"
                )
    return StackedExperts(keys, mlps)


class StackedExperts(nn.Module):
    """Made by `stack_experts`. Its parameters are `[experts, ...]`, named as in one MLP with "_" for each dot.

    Attributes:
        expert_weights: names of the parameters.
    """

    def __init__(self, keys: list[str], mlps: list[nn.Module]) -> None:
        super().__init__()
        self._keys = keys
        self._kinds = {name: name.replace(".", "_") for name, _ in mlps[0].named_parameters()}
        self._by_stack = False
        self.expert_weights = tuple(self._kinds.values())
        for name, kind in self._kinds.items():
            parts = [mlp.get_parameter(name) for mlp in mlps]
            stack = torch.stack([p.detach() for p in parts])
            self.register_parameter(kind, nn.Parameter(stack, parts[0].requires_grad))
        self.mlp = _grouped(mlps[0])
        self.train(mlps[0].training)
        self.register_state_dict_post_hook(_name_by_expert)
        self.register_load_state_dict_pre_hook(_stack_entries)

    def expert_mlp(self, x: Tensor, groups: Groups, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs `[N, d]` for rows `x [N, d]` sorted by expert. See `hecate.adapters.base.OwnExperts`."""
        linears = [m for m in self.mlp.modules() if isinstance(m, _GroupedLinear)]
        for linear in linears:
            linear.use(groups, weights)
        try:
            return self.mlp(x)
        finally:
            for linear in linears:
                linear.use(None, {})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sums of experts' outputs; see `stack_experts`."""
        weights = {kind: getattr(self, kind) for kind in self.expert_weights}
        return run_experts(self.expert_mlp, weights, hidden_states, top_k_index, top_k_weights)

    def reset_parameters(self) -> None:
        """Draw each expert's weights as `nn.Linear` does."""
        for linear in (m for m in self.mlp.modules() if isinstance(m, _GroupedLinear)):
            stacks = {n: getattr(self, k) for n, k in linear.kinds.items()}
            weight = stacks["weight"]
            for row in range(len(weight)):
                drawn = nn.Linear(linear.in_features, linear.out_features, "bias" in stacks, weight.device)
                for name, stack in stacks.items():
                    stack.data[row].copy_(drawn.get_parameter(name))

    def name_by_stack(self) -> None:
        """From now on, `state_dict()` has stacked entries. `fully_shard` calls it."""
        self._by_stack = True

    def named_by_expert(self, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """`state` with the entries of each expert, under the names of the list, in place of the stacked entries."""
        stacks = {name: state[prefix + kind] for name, kind in self._kinds.items()}
        entries = {f"{prefix}{key}.{n}": stack[i] for i, key in enumerate(self._keys) for n, stack in stacks.items()}
        named: dict[str, Any] = {}
        for name, value in state.items():
            if name == prefix + self.expert_weights[0]:
                named |= entries
            elif name.removeprefix(prefix) not in self.expert_weights or not name.startswith(prefix):
                named[name] = value
        return named


class _GroupedLinear(nn.Module):
    """Stands in for an `nn.Linear` of one MLP, and computes with the weights of several experts."""

    def __init__(self, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.kinds = {n: f"{name}.{n}".lstrip(".").replace(".", "_") for n, _ in linear.named_parameters()}
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.use(None, {})

    def use(self, groups: Groups | None, weights: Mapping[str, Tensor]) -> None:
        """Compute with these weights, by kind, until the next call."""
        self._groups = groups
        self._weights = [weights[kind] for kind in self.kinds.values()] if weights else []

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("kinds", ()):
            raise AttributeError(
                f"stack_experts: the MLP reads {name} of an nn.Linear, which several experts have here; it must call "
                "the nn.Linear"
            )
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, i]` to `[N, o]`."""
        assert self._groups is not None
        weight, *bias = self._weights
        out = grouped_linear(x, weight, self._groups)
        return grouped_bias(out, bias[0], self._groups) if bias else out


def _grouped(mlp: nn.Module) -> nn.Module:
    """A copy of `mlp` with a `_GroupedLinear` in place of each `nn.Linear`, so without parameters."""
    if isinstance(mlp, nn.Linear):
        return _GroupedLinear("", mlp)
    made = copy.deepcopy(mlp)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear):
            made.set_submodule(name, _GroupedLinear(name, module))
    return made


def _check_linear(key: str, mlp: nn.Module) -> None:
    linears = [name for name, module in mlp.named_modules() if type(module) is nn.Linear]
    linear = {f"{name}.{weight}".lstrip(".") for name in linears for weight in ("weight", "bias")}
    others = [name for name, _ in mlp.named_parameters() if name not in linear]
    if others := others + [name for name, _ in mlp.named_buffers()]:
        kind = type(mlp).__name__
        raise ValueError(f"stack_experts: {', '.join(others)} of MLP {key} ({kind}) must belong to an nn.Linear")
    if not any(True for _ in mlp.parameters()):
        raise ValueError(f"stack_experts: MLP {key} ({type(mlp).__name__}) has no nn.Linear")
    names = [name for name, _ in mlp.named_parameters(remove_duplicate=False)]
    if len(names) != len(list(mlp.parameters())) or len({n.replace(".", "_") for n in names}) != len(names):
        raise ValueError(
            f"stack_experts: weights {names} of MLP {key} are tied or have names that differ only by '_' and '.'"
        )


def _check_hooks(mlps: nn.Module) -> None:
    """ValueError if something was attached to an MLP or one of its layers: the stacked ones would run without it."""
    for name, module in mlps.named_modules():
        if name and not called_alone(module):
            kind = type(module).__name__
            raise ValueError(
                f"stack_experts: {name} ({kind}) has hooks or a replaced forward, which would be lost; attach them to "
                "the module that stack_experts returns, or compute it in the MLP's own forward"
            )


def _description(mlp: nn.Module) -> dict[str, Any]:
    """What must be equal in all MLPs."""
    described: dict[str, Any] = {"the structure": f"{type(mlp).__qualname__}: {mlp!r}", "train mode": mlp.training}
    for name, p in mlp.named_parameters():
        described[name] = f"{tuple(p.shape)} {p.dtype} on {p.device}, requires_grad={p.requires_grad}"
    for prefix, module in mlp.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training":
                described[f"attribute {prefix}.{name}".replace(" .", " ")] = value
    return described


def _name_by_expert(module: StackedExperts, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    if not module._by_stack:
        named = module.named_by_expert(state_dict, prefix)
        state_dict.clear()
        state_dict.update(named)


def _stack_entries(module: StackedExperts, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before loading: stack the entries of the experts, if all are there; else loading names what is missing."""
    for name, kind in module._kinds.items():
        keys = [f"{prefix}{key}.{name}" for key in module._keys]
        if all(key in state_dict for key in keys):
            state_dict[prefix + kind] = torch.stack([state_dict.pop(key) for key in keys])
