"""Initial values that depend only on a seed and on names, not on the sharding (docs/design.md, decision 14).

A model's own rules fill one module at a time: a Hugging Face style `_init_weights(module)` of the module's nearest
ancestor that has one, else the module's `reset_parameters()`. While a rule runs, every tensor of the model is replaced
by a stand-in on the meta device, except those that the rule writes. These are drawn on the CPU by a generator seeded
with (seed, module name); stacked experts are drawn one expert at a time with (seed, module name, expert). A rule must
not read values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hecate.experts import POOL_PREFIX
from hecate.names import original_modules
from hecate.values.local import local_tensor

__all__ = ["Stack", "allocate", "initialize", "on_meta"]

Rule = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Stack:
    """The rows that this device owns of the stacked weights of one experts module.

    Attributes:
        name: name of the module.
        rows: kind -> `[owned, *shape]`, sharing memory with the model.
        experts: expert id of each row.
        names: original names of the kinds that are not called `name.kind`.
    """

    name: str
    rows: Mapping[str, Tensor]
    experts: Sequence[int]
    names: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, kind: str) -> str:
        """Original name of the stacked weights of one kind."""
        return self.names.get(kind, f"{self.name}.{kind}")


@runtime_checkable
class HoldsStack(Protocol):
    """An experts module whose stacked weights are in a pool."""

    def stand_in(self, kind: str, parameter: Tensor) -> None:
        """Have a parameter of its own again at the attribute of a stacked weight, until it is deleted."""


@dataclass(frozen=True)
class _Place:
    """An attribute of a module that holds a parameter or buffer.

    Attributes:
        module, attribute: the module, and the name of the attribute.
        tensor: what is there; None for stacked weights that are in a pool.
        stack: the stack if these are stacked weights, whose stand-ins have one expert; else None.
        kind: which weights of the stack.
    """

    module: nn.Module
    attribute: str
    tensor: Tensor | None
    stack: Stack | None = None
    kind: str = ""

    def stand_in(self, device: str) -> Tensor:
        """A tensor to put here while rules run: filled with NaN on the CPU, without memory on the meta device."""
        like = self.tensor if self.stack is None else self.stack.rows[self.kind]
        assert like is not None
        shape = like.shape if self.stack is None else (1, *like.shape[1:])
        fill = float("nan") if like.dtype.is_floating_point else 0
        made = torch.full(shape, fill, dtype=like.dtype, device=device)
        is_parameter = self.stack is not None or isinstance(self.tensor, nn.Parameter)
        return nn.Parameter(made, requires_grad=False) if is_parameter else made

    def put(self, tensor: Tensor) -> Tensor:
        if self.stack is not None and isinstance(self.module, HoldsStack):
            self.module.stand_in(self.attribute, tensor)
        else:
            setattr(self.module, self.attribute, tensor)
        return tensor

    def restore(self) -> None:
        if self.tensor is None:
            delattr(self.module, self.attribute)
        else:
            self.put(self.tensor)

    def store(self, value: Tensor, row: int | None) -> None:
        """Copy a drawn value to the model.

        Args:
            value: what a rule drew.
            row: row of the stack, for stacked weights; else None.
        """
        if self.stack is not None:
            assert row is not None
            self.stack.rows[self.kind][row].copy_(value[0])
            return
        assert self.tensor is not None
        target = self.tensor
        if isinstance(target, DTensor):  # without communication: every rank has drawn the same values
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()
        local_tensor(target).copy_(value)


def on_meta(model: nn.Module) -> set[str]:
    """Original names of parameters and buffers (including non-persistent ones) on the meta device."""
    return {name for name, place in _places(model).items() if place.tensor is not None and place.tensor.is_meta}


def allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate all tensors that are on the meta device, without initializing them; tied parameters stay tied."""
    made: dict[int, Tensor] = {}
    for place in _places(model).values():
        tensor = place.tensor
        if tensor is None or not tensor.is_meta:
            continue
        if id(tensor) not in made:
            empty = torch.empty_like(tensor.detach(), device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        place.put(made[id(tensor)])
    if made and isinstance(model, FSDPModule):
        model.to(device)  # moves nothing, but makes FSDP2 update its references to the parameters


@torch.no_grad()
def initialize(
    model: nn.Module,
    stacks: Sequence[Stack],
    seed: int,
    rule: Rule | None = None,
    wanted: set[str] | None = None,
) -> set[str]:
    """Fill parameters and buffers in place, with the same values on every rank and on any number of ranks.

    Args:
        model: the model, sharded or not, between passes.
        stacks: its stacked experts.
        seed: seed of all values.
        rule: fills the tensors of the module it is given; None: the model's own rules.
        wanted: names of the tensors to fill; None: all.

    Returns:
        Names of the tensors that got values; those of stacked weights are `name.kind`.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass may have left it unsharded
    modules = original_modules(model)
    places = _places(model)
    for stack in stacks:
        for kind in stack.rows:
            present = places.get(name := stack.name_of(kind))
            tensor = None if present is None else present.tensor
            home, _, attribute = name.rpartition(".")
            places[name] = _Place(modules[home], attribute, tensor, stack, kind)
    given: set[str] = set()
    scaffold = _Scaffold(places, set(places) if wanted is None else wanted, seed)
    try:
        # Children come before parents, because rules of parents may overwrite values of children.
        for name, module in reversed(modules.items()):
            given |= scaffold.fill(name, module, _rules(modules, name) if rule is None else [rule])
    finally:
        for place in places.values():
            place.restore()
    return given


def _places(model: nn.Module) -> dict[str, _Place]:
    """All parameters and buffers except the pools', by original name; a tied one is listed under each of its names."""
    places = {}
    for prefix, module in original_modules(model).items():
        tensors = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, tensor in tensors:
            if not name.startswith(POOL_PREFIX):
                places[f"{prefix}.{name}" if prefix else name] = _Place(module, name, tensor)
    return places


def _rules(modules: Mapping[str, nn.Module], name: str) -> list[Rule]:
    """The model's own rules for one module, in order: a tensor gets its values from the first rule that writes it."""
    rules: list[Rule] = []
    ancestor = name
    while True:
        if callable(init_weights := getattr(modules[ancestor], "_init_weights", None)):
            rules.append(init_weights)
            break
        if not ancestor:
            break
        ancestor = ancestor.rpartition(".")[0]
    if callable(reset := getattr(modules[name], "reset_parameters", None)):
        rules.append(lambda module: reset())
    return rules


class _Scaffold:
    """The model while each of its tensors is replaced by a stand-in on the meta device."""

    def __init__(self, places: Mapping[str, _Place], wanted: set[str], seed: int) -> None:
        self._places, self._wanted, self._seed = places, wanted, seed
        self._stand_ins = {name: place.put(place.stand_in("meta")) for name, place in places.items()}

    def fill(self, name: str, module: nn.Module, rules: Iterable[Rule]) -> set[str]:
        """Run the rules of one module; returns the names of the tensors that got values."""
        own = {n for n, place in self._places.items() if place.module is module}
        given: set[str] = set()
        for number, rule in enumerate(rules):
            if number and own <= given:
                break
            names = ((own | self._written(name, module, rule)) & self._wanted) - given
            stacks = {stack.name: stack for n in names if (stack := self._places[n].stack) is not None}
            given |= self._draw(module, rule, [n for n in names if self._places[n].stack is None], name)
            for stack in stacks.values():
                of_stack = [n for n in names if self._places[n].stack is stack]
                for row, expert in enumerate(stack.experts):
                    given |= self._draw(module, rule, of_stack, f"{name}:{expert}", row)
                if not len(stack.experts):  # owns none; report the names that the owning ranks fill
                    given |= set(of_stack)
        return given

    def _written(self, name: str, module: nn.Module, rule: Rule) -> set[str]:
        """Names of the tensors in `module` and below that `rule` writes; found on the meta device."""
        if next(module.children(), None) is None:
            return set()  # it can only write its own tensors, which are drawn anyway
        prefix = f"{name}." if name else ""
        below = {n: t._version for n, t in self._stand_ins.items() if n.startswith(prefix)}
        with torch.random.fork_rng(devices=[]):
            rule(module)
        return {n for n, version in below.items() if self._stand_ins[n]._version != version}

    def _draw(self, module: nn.Module, rule: Rule, names: Iterable[str], key: str, row: int | None = None) -> set[str]:
        """Run `rule` with the tensors `names` on the CPU, and store what it wrote."""
        drawn = {n: self._places[n].put(self._places[n].stand_in("cpu")) for n in names}
        if not drawn:
            return set()
        versions = {n: t._version for n, t in drawn.items()}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed_of(self._seed, key))  # torch.manual_seed would also seed CUDA
            rule(module)
        given = {n for n, t in drawn.items() if _written_to(t, versions[n])}
        for n in given:
            if drawn[n].is_floating_point() and bool(drawn[n].isnan().any()):
                raise ValueError(f"init_weights: the rule for {key} writes {n} in part, or reads it; it must fill it")
        for n in drawn:
            if n in given:
                self._places[n].store(drawn[n], row)
            self._places[n].put(self._stand_ins[n])
        return given


def _written_to(tensor: Tensor, version: int) -> bool:
    # Writing through `.data` does not change the version, so also look whether the NaNs are gone.
    return tensor._version != version or (tensor.is_floating_point() and not bool(tensor.isnan().any()))


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
