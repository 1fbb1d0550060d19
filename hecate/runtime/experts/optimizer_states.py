"""`optimizer.state_dict()` and `load_state_dict()` by experts, whoever owns them.

An optimizer's state of a pool has a row per slot of this device. In a state dict each of its tensors is one DTensor of
the `num_experts` of all the pool's layers, in the order (layer, expert), as `by_expert.py` has it, and the mark
`BY_EXPERT` beside them is true. So a state dict that was loaded into an optimizer that the engine does not know yet is
recognized when it is met: before its first step, or when the engine saves it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.experts import POOL_PREFIX
from hecate.placement import Placement
from hecate.ranks.agree import agree, gather
from hecate.runtime.comms import Comms
from hecate.runtime.experts.by_expert import experts_of, in_order, misfit, rows_of
from hecate.runtime.experts.pool import ExpertPool
from hecate.values.local import local_tensor

__all__ = ["BY_EXPERT", "OptimizerStates", "has_rows"]

BY_EXPERT = "hecate_by_expert"
"""In the state of a pool's parameter, beside tensors: whether they are by expert, or have a row a slot.

A bool tensor like all else there, on the CPU, where reading it costs nothing.
"""

State = dict[str, Any]
"""Of one parameter."""
Home = tuple[str, ExpertPool]
"""Name of a pool's parameter, and the pool."""


def has_rows(state: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter has what may be by row or expert."""
    return not all(map(_is_plain, state.values()))


def _is_plain(value: object) -> bool:
    """Numbers and strings, alone or in containers: the same for all experts."""
    if isinstance(value, Tensor):
        return not value.ndim
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str)


class OptimizerStates:
    """Brings the state of optimizers from slots to experts for state dicts, and back.

    Args:
        pools: in the order of their names.
        comms: among their owners.
    """

    def __init__(self, pools: Sequence[ExpertPool], comms: Comms) -> None:
        self._homes: dict[nn.Parameter, Home] = {
            parameter: (f"{POOL_PREFIX}{number}_{kind}", pool)
            for number, pool in enumerate(pools)
            for kind, parameter in pool.parameters.items()
        }
        self._comms = comms
        self._met: list[weakref.ref[Optimizer]] = []  # in the order of meeting, the same on all ranks

    def meet(self, optimizer: Optimizer) -> None:
        """Before it steps or is saved: give it the rows of what it loaded by expert. Collective if it has such state.

        Raises:
            ValueError: state that is neither rows of this run nor by expert; on all ranks.
        """
        if all(known() is not optimizer for known in self._met):
            self._met.append(weakref.ref(optimizer))
            self._hook(optimizer)
        owned = ((home, optimizer.state.get(parameter)) for parameter, home in self._homes.items())
        loaded = [(home, state) for home, state in owned if state and state.get(BY_EXPERT, True) and has_rows(state)]
        if not loaded:
            return
        _check_together(_check_loaded, loaded)
        rows = [self._rows(home, state) for home, state in loaded]
        for (_, state), new in zip(loaded, rows, strict=True):
            state |= new

    def optimizers(self) -> list[tuple[int, Optimizer]]:
        """Those that are alive, each with its number among all that were ever met."""
        alive = ((number, known()) for number, known in enumerate(self._met))
        return [(number, optimizer) for number, optimizer in alive if optimizer is not None]

    def home_of(self, parameter: object) -> Home | None:
        """Name of a pool's parameter, and the pool; None for any other."""
        return self._homes.get(parameter)  # type: ignore[call-overload]  # keys of optimizer.state may be anything

    def mark(self, optimizer: Optimizer) -> None:
        """After it stepped: state that is new has a row a slot."""
        for parameter in self._homes:
            state = optimizer.state.get(parameter)
            if state and BY_EXPERT not in state and has_rows(state):
                state[BY_EXPERT] = torch.tensor(False)

    # State dicts.

    def _hook(self, optimizer: Optimizer) -> None:
        states = weakref.ref(self)  # an optimizer must not keep the pools

        def by_expert(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            if (alive := states()) is not None:
                alive._to_experts(optimizer, state_dict)

        def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            if (alive := states()) is not None:
                loaded = [(home, state) for _, home, state in alive._packed(optimizer, state_dict)]
                _check_together(_check_new, loaded)

        def take(optimizer: Optimizer) -> None:
            if (alive := states()) is not None:
                alive.meet(optimizer)

        if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
            return  # a wrapper that has no hooks, accelerate's say: the optimizer inside is met when it steps
        optimizer.register_state_dict_post_hook(by_expert)
        optimizer.register_load_state_dict_pre_hook(check)
        optimizer.register_load_state_dict_post_hook(take)

    def _packed(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[int, Home, State]]:
        """Key in a state dict, home and state of what it has of pools."""
        for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
            for parameter, key in zip(group["params"], packed["params"], strict=False):
                if parameter in self._homes and (state := state_dict["state"].get(key)) and has_rows(state):
                    yield key, self._homes[parameter], state

    def _to_experts(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Collective, unless the owners of all experts are in order."""
        packed = list(self._packed(optimizer, state_dict))
        states = [(home, state) for _, home, state in packed]
        if all(in_order(_owners(pool)) for (_, pool), _ in states):
            for home, state in states:
                _check_rows(home, state)
        else:
            _check_together(_check_rows, states)
        # The states in it are the optimizer's own: they are replaced, not changed.
        state_dict["state"] |= {key: state | self._entries(home, state) for key, home, state in packed}

    def _entries(self, home: Home, state: State) -> State:
        """Its tensors by expert."""
        _, pool = home
        owners = _owners(pool)
        owned = len(owners.held_by(pool.rank))
        with self._comms.guard(), torch.no_grad():
            tensors = {
                key: experts_of(local_tensor(value)[:owned], owners, pool.mesh, self._comms.experts)
                for key, value in _tensors(home, state)
            }
        return tensors | {BY_EXPERT: torch.tensor(True)}

    def _rows(self, home: Home, state: State) -> State:
        """Its tensors with a row a slot."""
        _, pool = home
        tensors = {}
        for key, value in _tensors(home, state) if BY_EXPERT in state else ():
            with self._comms.guard(), torch.no_grad():
                owned = rows_of(value, _owners(pool), pool.rank, pool.mesh, self._comms.experts)
            slots = owned.new_zeros(pool.slots, *owned.shape[1:])
            slots[: len(owned)] = owned
            tensors[key] = pool.distribute(slots)
        return tensors | {BY_EXPERT: torch.tensor(False)}


def _owners(pool: ExpertPool) -> Placement:
    """Of the experts of all its layers."""
    return Placement.from_owners(np.concatenate(pool.owners), pool.num_devices)


def _tensors(home: Home, state: State) -> Iterator[tuple[str, Tensor]]:
    """Those that are by row or expert, in one order on all ranks.

    On one device state of any shape is in order, and stays as it is.
    """
    name, pool = home
    experts = sum(len(owners) for owners in pool.owners)
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Tensor) and value.ndim:
            if pool.num_devices > 1 or value.shape[0] == experts:
                yield key, value
        elif pool.num_devices > 1 and not _is_plain(value):
            raise ValueError(
                f"optimizer state {key} of {name} is a {type(value).__name__}; must be a number or a tensor, so that "
                "its rows can go with the experts"
            )


def _check_rows(home: Home, state: State) -> None:
    """ValueError where state of this optimizer cannot be brought to experts."""
    name, pool = home
    for key, value in _tensors(home, state):
        if local_tensor(value).shape[0] != pool.slots:
            raise ValueError(
                f"optimizer state {key} of {name} has local shape {tuple(local_tensor(value).shape)}; its first "
                f"dimension must be the {pool.slots} slots of a device, to be brought to experts"
            )
    if BY_EXPERT not in state:
        _check_constant(home, state)


def _check_loaded(home: Home, state: State) -> None:
    """ValueError where loaded state cannot be brought to owners."""
    name, pool = home
    if BY_EXPERT not in state:
        _check_constant(home, state)
        return
    experts = sum(len(owners) for owners in pool.owners)
    for key, value in _tensors(home, state):
        if problem := misfit(value, torch.Size((experts, *value.shape[1:])), pool.mesh):
            raise ValueError(f"optimizer state {key} of {name} {problem}, by (layer, expert)")


def _check_new(home: Home, state: State) -> None:
    """`_check_loaded`, of a state dict."""
    if not state.get(BY_EXPERT, True):
        raise ValueError(
            f"optimizer state of {home[0]} to be loaded has rows of slots, whose experts may have moved since; load "
            "what optimizer.state_dict() gives"
        )
    _check_loaded(home, state)


def _check_constant(home: Home, state: State) -> None:
    """ValueError for tensors of unknown order, unless all their values are one: those that an optimizer begins with."""
    name, pool = home
    if pool.num_devices == 1:
        return
    for key, value in _tensors(home, state):
        local = local_tensor(value)
        if local.numel() and not bool((local == local.flatten()[0]).all()):
            raise ValueError(
                f"optimizer state {key} of {name} lacks {BY_EXPERT!r} beside it, which tells whether it is by expert; "
                "it must come from optimizer.state_dict() of an optimizer that has stepped, or by engine.load"
            )


def _check_together(check: Callable[[Home, State], None], states: Sequence[tuple[Home, State]]) -> None:
    """What `check` raises on one rank is raised on all; so is ValueError where ranks differ. Collective."""

    def described() -> list[tuple[str, str, tuple[int, ...], str]]:
        for home, state in states:
            check(home, state)
        tensors = ((home[0], key, value) for home, state in states for key, value in _tensors(home, state))
        return [(name, key, tuple(value.shape), str(value.dtype)) for name, key, value in tensors]

    everyone = gather(agree(described))
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            first = next(a or b for a, b in zip_longest(everyone[0], other) if a != b)
            raise ValueError(
                f"optimizer state {first[1]} of {first[0]} is not the same on rank 0 and rank {rank}; its name, shape "
                "and dtype must be"
            )
