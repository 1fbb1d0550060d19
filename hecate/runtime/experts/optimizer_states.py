"""Makes `optimizer.state_dict()` and `load_state_dict()` independent of owners: state is by expert, not by slot.

In an optimizer, a state tensor of a pool has one row per slot of this device. In a state dict it is one DTensor with
one row per expert of all layers of the pool, in the order (layer, expert), see `by_expert.py`, and `BY_EXPERT` is True
in the parameter group. Parameter groups are loaded together with the state. So the engine recognizes state by expert
that was loaded before it knew the optimizer, and converts it before the first step, or when the optimizer is saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hecate.experts import POOL_PREFIX
from hecate.placement import Placement
from hecate.ranks.agree import agree, gather
from hecate.runtime.comms import Comms
from hecate.runtime.experts.by_expert import experts_of, in_order, misfit, rows_of
from hecate.runtime.experts.pool import ExpertPool
from hecate.values.local import local_tensor

__all__ = ["BY_EXPERT", "OptimizerStates"]

BY_EXPERT = "hecate_by_expert"
"""Key in a parameter group with pools: whether their state is by expert. False in optimizers that the engine knows."""


@dataclass(frozen=True)
class _PoolState:
    """The state of one parameter of a pool, in an optimizer or in a state dict.

    Attributes:
        name: name of the parameter.
        pool: the pool that it belongs to.
        values: the state by key.
        by_expert: value of `BY_EXPERT` in its parameter group; None if the group does not have that key.
    """

    name: str
    pool: ExpertPool
    values: dict[str, Any]
    by_expert: bool | None

    @property
    def owners(self) -> Placement:
        """The owners of the experts of all layers of the pool."""
        return Placement.from_owners(np.concatenate(self.pool.owners), self.pool.num_devices)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors with one row per slot or per expert, in the same order on all ranks.

        On one device, state of another shape is left out; it can stay as it is. On several devices ValueError for state
        that is neither such a tensor nor a number.
        """
        for key in sorted(self.values):
            value = self.values[key]
            if isinstance(value, Tensor) and value.ndim:
                if self.pool.num_devices > 1 or value.shape[0] == self.owners.num_experts:
                    yield key, value
            elif self.pool.num_devices > 1 and not _is_plain(value):
                raise ValueError(
                    f"optimizer state {key} of {self.name} is a {type(value).__name__}; must be a number or a tensor, "
                    "so that its rows can go with the experts"
                )


class OptimizerStates:
    """Brings the state of optimizers from slots to experts for state dicts, and back.

    Args:
        pools: all pools, in the order of their names.
        comms: process groups of the devices that share the experts.
    """

    def __init__(self, pools: Sequence[ExpertPool], comms: Comms) -> None:
        self._homes: dict[nn.Parameter, tuple[str, ExpertPool]] = {
            parameter: (f"{POOL_PREFIX}{number}_{kind}", pool)
            for number, pool in enumerate(pools)
            for kind, parameter in pool.parameters.items()
        }
        self._comms = comms
        self._loaded: list[Callable[[], None]] = []
        self._met: list[weakref.ref[Optimizer]] = []  # in the order in which they were met, the same on all ranks

    def meet(self, optimizer: Optimizer) -> None:
        """Get to know an optimizer, and convert state that it has loaded by expert to rows of slots.

        Call it before the optimizer steps or is saved. Collective if it has such state.

        Raises:
            ValueError: state that was neither made in this run nor loaded by expert; on all ranks.
        """
        if all(known() is not optimizer for known in self._met):
            self._met.append(weakref.ref(optimizer))
            self._hook(optimizer)
        groups = [g for g in optimizer.param_groups if any(p in self._homes for p in g["params"])]
        if all(group.get(BY_EXPERT) is False for group in groups):
            return
        loaded = [s for s in self._states(groups, optimizer.state) if s.by_expert is not False]
        _check_together(_check_loaded, loaded)
        rows = [self._rows(state) if state.by_expert else {} for state in loaded]
        for state, values in zip(loaded, rows, strict=True):
            state.values.update(values)
        for group in groups:
            group[BY_EXPERT] = False
        for listener in self._loaded:
            listener()

    def on_load(self, listener: Callable[[], None]) -> None:
        """Call `listener` when an optimizer comes with state that it has loaded, or is new."""
        self._loaded.append(listener)

    def optimizers(self) -> list[tuple[int, Optimizer]]:
        """The optimizers that are alive, each with its number among all that were ever met."""
        alive = ((number, known()) for number, known in enumerate(self._met))
        return [(number, optimizer) for number, optimizer in alive if optimizer is not None]

    def home_of(self, parameter: object) -> tuple[str, ExpertPool] | None:
        """Name of a pool's parameter, and the pool; None for any other."""
        return self._homes.get(parameter)  # type: ignore[call-overload]  # keys of optimizer.state may be anything

    def _states(self, groups: Iterable[Mapping[str, Any]], state: Mapping[Any, dict[str, Any]]) -> list[_PoolState]:
        """The state of all parameters of pools in `groups`."""
        return [
            _PoolState(*self._homes[parameter], values, group.get(BY_EXPERT))
            for group in groups
            for parameter in group["params"]
            if parameter in self._homes and (values := state.get(parameter))
        ]

    # State dicts.

    def _hook(self, optimizer: Optimizer) -> None:
        states = weakref.ref(self)  # an optimizer must not keep the pools

        def by_expert(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            if (alive := states()) is not None:
                alive._to_experts(optimizer, state_dict)

        def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            if (alive := states()) is not None:
                _check_together(_check_new, [state for _, state in alive._packed(optimizer, state_dict)])

        def take(optimizer: Optimizer) -> None:
            if (alive := states()) is not None:
                alive.meet(optimizer)

        try:
            optimizer.register_state_dict_post_hook(by_expert)
        except AttributeError:
            return  # a wrapper without these hooks, e.g. accelerate's: the optimizer inside is met when it steps
        optimizer.register_load_state_dict_pre_hook(check)
        optimizer.register_load_state_dict_post_hook(take)

    def _packed(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> list[tuple[Any, _PoolState]]:
        """The state of each parameter of a pool in a state dict, with its key there."""
        found = []
        for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
            for parameter, key in zip(group["params"], packed["params"], strict=False):
                if parameter in self._homes and (values := state_dict["state"].get(key)):
                    found.append((key, _PoolState(*self._homes[parameter], values, packed.get(BY_EXPERT))))
        return found

    def _to_experts(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Convert the state in a state dict. Collective, unless the owners of all experts are in order."""
        packed = self._packed(optimizer, state_dict)
        states = [state for _, state in packed]
        if all(in_order(state.owners) for state in states):
            for state in states:
                _check_rows(state)
        else:
            _check_together(_check_rows, states)
        for key, state in packed:  # the values are those of the optimizer, so they are replaced and not changed
            state_dict["state"][key] = state.values | self._entries(state)
        for group in state_dict["param_groups"]:
            if BY_EXPERT in group:
                group[BY_EXPERT] = True

    def _entries(self, state: _PoolState) -> dict[str, Tensor]:
        """The tensors of `state`, which have a row per slot, by expert."""
        owners, pool = state.owners, state.pool
        owned = len(owners.held_by(pool.rank))
        with self._comms.guard(), torch.no_grad():
            return {
                key: experts_of(local_tensor(value)[:owned], owners, pool.mesh, self._comms.experts)
                for key, value in state.tensors()
            }

    def _rows(self, state: _PoolState) -> dict[str, Tensor]:
        """The tensors of `state`, which are by expert, with a row per slot."""
        pool, rows = state.pool, {}
        for key, value in state.tensors():
            with self._comms.guard(), torch.no_grad():
                owned = rows_of(value, state.owners, pool.rank, pool.mesh, self._comms.experts)
            slots = owned.new_zeros(pool.slots, *owned.shape[1:])
            slots[: len(owned)] = owned
            rows[key] = pool.distribute(slots)
        return rows


def _is_plain(value: object) -> bool:
    """Whether `value` is a number or string, or a container of them, and thus the same for all experts."""
    if isinstance(value, Tensor):
        return not value.ndim
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str)


# Checks that raise ValueError.


def _check_rows(state: _PoolState) -> None:
    """Check that the tensors can be converted from slots to experts."""
    for key, value in state.tensors():
        if local_tensor(value).shape[0] != state.pool.slots:
            raise ValueError(
                f"optimizer state {key} of {state.name} has local shape {tuple(local_tensor(value).shape)}; its first "
                f"dimension must be the {state.pool.slots} slots of a device, to be brought to experts"
            )


def _check_loaded(state: _PoolState) -> None:
    """Check that the tensors can be converted from experts to slots, or need no conversion."""
    if state.by_expert is None:
        _check_constant(state)
        return
    for key, value in state.tensors():
        shape = torch.Size((state.owners.num_experts, *value.shape[1:]))
        if problem := misfit(value, shape, state.pool.mesh):
            raise ValueError(f"optimizer state {key} of {state.name} {problem}, by (layer, expert)")


def _check_new(state: _PoolState) -> None:
    """`_check_loaded` for state in a state dict that is about to be loaded."""
    if state.by_expert is False:
        raise ValueError(
            f"optimizer state of {state.name} to be loaded has rows of slots, whose experts may have moved since; load "
            "what optimizer.state_dict() gives"
        )
    _check_loaded(state)


def _check_constant(state: _PoolState) -> None:
    """Check tensors whose order is unknown: all values must be equal, as in an optimizer that has not stepped yet."""
    for key, value in state.tensors() if state.pool.num_devices > 1 else ():
        local = local_tensor(value)
        if local.numel() and not bool((local == local.flatten()[0]).all()):
            raise ValueError(
                f"optimizer state {key} of {state.name} comes with a parameter group that lacks {BY_EXPERT!r}, which "
                "tells its order; it must be of optimizer.state_dict() after a first step, or be read by engine.load"
            )


def _check_together(check: Callable[[_PoolState], None], states: Sequence[_PoolState]) -> None:
    """Call `check` on all states; raise its error on all ranks, and ValueError if ranks differ. Collective."""

    def described() -> list[tuple[str, str, tuple[int, ...], str, bool]]:
        for state in states:
            check(state)
        tensors = [(state.name, key, value) for state in states for key, value in state.tensors()]
        return [(name, key, tuple(v.shape), str(v.dtype), isinstance(v, DTensor)) for name, key, v in tensors]

    everyone = gather(agree(described))
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            name, key, *_ = next(a or b for a, b in zip_longest(everyone[0], other) if a != b)
            raise ValueError(
                f"optimizer state {key} of {name} is not the same on rank 0 and rank {rank}; its name, shape, dtype "
                "and kind (DTensor or not) must be"
            )
