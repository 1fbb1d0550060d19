"""Re-sharding: changes the owners of experts, decided for all layers of a pool at once (paper, Algorithm 2).

At the same time copies change that stay in between, if the policy keeps any.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hecate.collectives.transport import Transport
from hecate.experts import POOL_PREFIX
from hecate.placement import Placement
from hecate.policies.base import LayerSetting, Policy
from hecate.ranks.messages import all_reduce
from hecate.ranks.same import check_placements
from hecate.runtime.comms import Comms
from hecate.runtime.experts.move import move
from hecate.runtime.experts.moving_state import MovingState
from hecate.runtime.experts.optimizers import OptimizerWatch
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.plans.layer import LayerPlans
from hecate.values.local import local_tensor

__all__ = ["Moved", "Resharded", "Resharder"]

Moved = Callable[[str, NDArray[np.int64], NDArray[np.int64]], None]
"""`(pool_name, old_rows, new_rows)`, see `FSSDP.on_reshard`."""


class Resharded(NamedTuple):
    """What re-sharding has moved before one step: experts, and bytes of their weights and states, over all devices."""

    experts: int = 0
    bytes: int = 0


class Resharder:
    """Re-shards all pools every `interval` steps.

    Args:
        layers: plans of the model's MoE layers, in order.
        policy: decides the new owners.
        watch: tells whether an optimizer is in the middle of a step.
        state: finds the optimizer state that moves with the experts.
        comms: process groups and transport. Replicas must have equal owners, so loads are summed over them.
        interval: optimizer steps between re-shardings; 0: never.

    Attributes:
        last: what was moved before the present step.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlans],
        policy: Policy,
        watch: OptimizerWatch,
        state: MovingState,
        comms: Comms,
        interval: int,
    ) -> None:
        self._layers = tuple(layers)
        self._policy = policy
        self._watch = watch
        self._state = state
        self._comms = comms
        self._interval = interval
        self._pools = list(dict.fromkeys(layer.experts.pool for layer in self._layers))
        self._listeners: OrderedDict[int, Moved] = OrderedDict()
        self._followers: list[Callable[[ExpertPool], list[Tensor]]] = []
        self.last = Resharded()

    def on_move(self, listener: Moved) -> RemovableHandle:
        """Call `listener` after owners have changed; see `FSSDP.on_reshard`."""
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = listener
        return handle

    def follow(self, tensors: Callable[[ExpertPool], list[Tensor]]) -> None:
        """From now on, move the rows of `tensors(pool)`, `[slots, ...]` each, together with those of the pool."""
        self._followers.append(tensors)

    def before_step(self, step: int) -> None:
        """Re-shard if `step` is a multiple of the interval. Collective.

        Raises:
            ValueError: an optimizer has state that cannot move; on all ranks. Checked after the first step already.
        """
        transport, self.last = self._comms.experts, Resharded()
        if transport is None or not self._interval or not step or self._policy.keeps:
            return
        if step == 1:
            self._state.check()
        if step % self._interval or self._watch.stepping:  # during its step, an optimizer may hold rows elsewhere
            return
        for number, pool in enumerate(self._pools):
            layers = [layer for layer in self._layers if layer.experts.pool is pool]
            settings, loads = self._settings_and_loads(layers)
            if not any(load.any() for load in loads):
                continue  # already re-sharded at this step, e.g. before an evaluation
            owners = self._policy.reshard(settings, loads, pool.owners)
            _check_on_all_ranks([Placement.from_owners(owner, pool.num_devices) for owner in owners])
            for layer in layers:
                layer.since_reshard[:] = 0
            self._move(f"{POOL_PREFIX}{number}", pool, owners, transport)

    def _move(self, name: str, pool: ExpertPool, owners: Sequence[NDArray[np.int64]], transport: Transport) -> None:
        if all(np.array_equal(old, new) for old, new in zip(pool.owners, owners, strict=True)):
            return
        before, tensors = pool.flat_rows(), self._tensors(pool)
        moved = sum(int((old != new).sum()) for old, new in zip(pool.owners, owners, strict=True))
        row = sum(tensor.nbytes // pool.slots for tensor in tensors)
        self.last = Resharded(self.last.experts + moved, self.last.bytes + moved * row)
        move(pool, owners, tensors, transport)
        for listener in list(self._listeners.values()):
            listener(name, before, pool.flat_rows())

    def change_kept(self, step: int) -> bool:
        """If `step` is a multiple of the interval, add, move and remove the copies that stay until the next time.

        Call it before the first pass with gradients of a step, in which weights are those that are trained. Collective.

        Returns:
            Whether they have changed.

        Raises:
            RuntimeError: copies are not in step with their owners; see `KeptCopies.check`.
        """
        changed = False
        for pool in self._pools if step and step % self._interval == 0 else ():
            layers = [layer for layer in self._layers if layer.experts.pool is pool]
            settings, loads = self._settings_and_loads(layers)
            kept = layers[0].experts.kept
            if kept is None or not any(load.any() for load in loads):
                continue
            chosen = [
                self._policy.keep(setting, load, layer.owners, layer.experts.kept_placement)
                for layer, setting, load in zip(layers, settings, loads, strict=True)
            ]
            _check_on_all_ranks(chosen)
            for layer in layers:
                layer.since_reshard[:] = 0
            kept.check()
            changed |= kept.change(chosen)
        return changed

    def _settings_and_loads(
        self, layers: Sequence[LayerPlans]
    ) -> tuple[tuple[LayerSetting, ...], list[NDArray[np.int64]]]:
        """Per layer, what the policy is told, and int64 `[num_experts]`, loads since the last time."""
        replicas = 1 if self._comms.replicas is None else self._comms.replicas.size()
        loads, settings = [], []
        for layer in layers:
            # Loads and settings must be equal in all replicas; otherwise they would choose different owners.
            *load, tokens = self._summed(np.append(layer.since_reshard, layer.tokens_per_device)).tolist()
            loads.append(np.array(load, dtype=np.int64))
            settings.append(layer.setting(tokens // replicas))
        return tuple(settings), loads

    def _summed(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """`values` summed over replicas. Collective over them."""
        if self._comms.replicas is None:
            return values
        total = torch.from_numpy(values).to(self._layers[0].experts.pool.device)
        all_reduce(total, group=self._comms.replicas)
        return total.cpu().numpy()

    def _tensors(self, pool: ExpertPool) -> list[Tensor]:
        """All tensors with one row per slot, in the same order on all ranks.

        Optimizer state, parameters, pending gradients, and the tensors given to `follow`.
        """
        tensors = self._state.tensors(pool)
        for parameter in pool.parameters.values():
            tensors.append(local_tensor(parameter))
            if parameter.grad is not None:
                tensors.append(local_tensor(parameter.grad))
        tensors += [pool.unreduced[kind] for kind in pool.parameters if kind in pool.unreduced]
        return tensors + [tensor for follower in self._followers for tensor in follower(pool)]


def _check_on_all_ranks(chosen: Sequence[Placement]) -> None:
    check_placements("re-sharding", tuple(chosen), dist.group.WORLD)  # type: ignore[arg-type]  # there is one here
