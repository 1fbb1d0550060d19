"""Moving ownership: experts change devices with their gradients and optimizer state (paper, Algorithm 2).

The optimizer is found by torch's public hook on every optimizer step, which also defines what a step is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from hecate.collectives.schedule import gather_schedule
from hecate.collectives.transport import Transport
from hecate.placement import Placement
from hecate.policies.base import Policy
from hecate.runtime.planner import LayerPlanner
from hecate.runtime.pool import ExpertPool, local_tensor

__all__ = ["OptimizerWatch", "Resharder"]


class OptimizerWatch:
    """Knows the optimizers that train `model`, and calls `after_step` when one has made a step."""

    def __init__(self, model: nn.Module, after_step: Callable[[], None]) -> None:
        self._trained = {id(p) for p in model.parameters()}
        self._after_step = after_step
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        watch = weakref.ref(self)  # the hook is global: it must not keep the model alive

        def hook(optimizer: Optimizer, args: object, kwargs: object) -> None:
            alive = watch()
            if alive is not None:
                alive._stepped(optimizer)

        weakref.finalize(self, register_optimizer_step_post_hook(hook).remove)

    def _stepped(self, optimizer: Optimizer) -> None:
        if any(id(p) in self._trained for group in optimizer.param_groups for p in group["params"]):
            self.optimizers.add(optimizer)
            self._after_step()


class Resharder:
    """Re-shards every `interval` steps, all pools and layers at once.

    Args:
        layers: of the model, in order.
        policy: decides the new owners.
        watch: knows the optimizers whose state moves with the experts.
        transport: carries the rows; None on one device, where nothing moves.
        replicas: group over which ownership must agree and loads are summed; None without replication.
        interval: optimizer steps; 0 never.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlanner],
        policy: Policy,
        watch: OptimizerWatch,
        transport: Transport | None,
        replicas: dist.ProcessGroup | None,
        interval: int,
    ) -> None:
        self._layers = tuple(layers)
        self._policy = policy
        self._watch = watch
        self._transport = transport
        self._replicas = replicas
        self._interval = interval

    def before_step(self, step: int) -> None:
        """Move ownership if `step` optimizer steps are a whole number of intervals. Collective."""
        if self._transport is None or not self._interval or not step or step % self._interval:
            return
        for pool in dict.fromkeys(layer.storage.pool for layer in self._layers):
            layers = [layer for layer in self._layers if layer.storage.pool is pool]
            loads = [self._summed(layer.since_reshard) for layer in layers]
            if not any(load.any() for load in loads):
                continue  # done for this step already, before an evaluation or a checkpoint
            owners = self._policy.reshard(tuple(layer.outlook().setting for layer in layers), loads, pool.owners)
            for layer in layers:
                layer.since_reshard[:] = 0
            move(pool, owners, self._tensors(pool), self._transport)

    def _summed(self, loads: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._replicas is None:
            return loads
        total = torch.from_numpy(loads).to(self._layers[0].storage.pool.device)
        dist.all_reduce(total, group=self._replicas)
        return total.cpu().numpy()

    def _tensors(self, pool: ExpertPool) -> Iterator[Tensor]:
        """Tensors with a row per slot: parameters, pending gradients, optimizer state; in one order on all ranks."""
        for parameter in pool.parameters.values():
            yield local_tensor(parameter)
            if parameter.grad is not None:
                yield local_tensor(parameter.grad)
            for optimizer in self._watch.optimizers:
                state = optimizer.state.get(parameter, {})
                values = (state[key] for key in sorted(state) if isinstance(state[key], Tensor))
                yield from (v for v in map(local_tensor, values) if v.ndim and v.shape[0] == pool.slots)


def move(
    pool: ExpertPool, owners: Sequence[NDArray[np.int64]], tensors: Iterator[Tensor], transport: Transport
) -> None:
    """Give `pool` new owners and permute the rows of `tensors` accordingly, in place. Collective.

    Args:
        pool: whose slots move.
        owners: per layer, int64 `[num_experts]`.
        tensors: `[slots, ...]` each, the same number and order on every rank.
        transport: among the devices of the pool.
    """
    before, after = (Placement.from_owners(np.concatenate(o), pool.num_devices) for o in (pool.owners, list(owners)))
    if before == after:
        return
    schedule = gather_schedule(before, after)
    old, new = before.held_by(pool.rank).tolist(), after.held_by(pool.rank).tolist()
    for tensor in tensors:
        rows = tensor.flatten(1)
        moved = torch.zeros_like(rows)
        sent, received = dict(zip(old, rows, strict=False)), dict(zip(new, moved, strict=False))
        for expert in sent.keys() & received.keys():
            received[expert].copy_(sent[expert])
        transport.gather(schedule, sent, received).wait()
        rows.copy_(moved)
    pool.owners = [np.array(o, dtype=np.int64) for o in owners]
