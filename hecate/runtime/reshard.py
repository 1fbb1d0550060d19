"""Moving ownership: experts change devices with their gradients and optimizer state (paper, Algorithm 2).

The optimizer is found by torch's public hook on every optimizer step, which also defines what a step is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hecate.collectives.agreement import check_placements
from hecate.collectives.schedule import gather_schedule
from hecate.collectives.transport import Transport
from hecate.placement import Placement, Topology
from hecate.policies.base import Policy
from hecate.runtime.autograd_seam import in_backward
from hecate.runtime.planner import LayerPlanner
from hecate.runtime.pool import ExpertPool, local_tensor

__all__ = ["OptimizerWatch", "Resharder"]


WHOLE_TENSORS = ("torch.optim.Adafactor", "transformers.optimization.Adafactor")
"""Optimizers whose steps depend on norms of whole tensors, and that take those of this rank's part."""


class OptimizerWatch:
    """Knows the optimizers that train the experts, and calls `after_step` when one has made a step.

    Where all experts are frozen, optimizers of any other parameter count. A step inside a backward pass (an optimizer
    that steps as gradients come) is not the end of a step. Before a step of `WHOLE_TENSORS` it raises ValueError.
    """

    def __init__(self, model: nn.Module, pools: Sequence[ExpertPool], after_step: Callable[[], None]) -> None:
        experts = [p for pool in pools for _, p in pool.trainable()]
        self._trained = {id(p) for p in experts or model.parameters()}
        self._after_step = after_step
        self._latest: dict[int, weakref.ref[Optimizer]] = {}  # by parameter id
        self._sharded = any(pool.num_devices > 1 for pool in pools)
        # The hooks are global: they must not keep the model alive. They stay when this object goes, doing nothing:
        # taking them away then could fall into a step of another optimizer, while torch iterates over the hooks.
        watch = weakref.ref(self)

        def before(optimizer: Optimizer, args: object, kwargs: object) -> None:
            alive = watch()
            if alive is not None and alive._sharded and alive.add(optimizer):
                _refuse_whole_tensors(optimizer)

        def after(optimizer: Optimizer, args: object, kwargs: object) -> None:
            alive = watch()
            if alive is not None and not in_backward() and alive.add(optimizer):
                alive._after_step()

        register_optimizer_step_pre_hook(before)
        register_optimizer_step_post_hook(after)

    def add(self, optimizer: Optimizer) -> bool:
        """Take note of an optimizer; whether it trains what is watched."""
        trained = [id(p) for group in optimizer.param_groups for p in group["params"] if id(p) in self._trained]
        self._latest.update(dict.fromkeys(trained, weakref.ref(optimizer)))
        return bool(trained)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer state of a watched parameter: of the optimizer that stepped it last; empty before."""
        reference = self._latest.get(id(parameter))
        optimizer = None if reference is None else reference()
        return {} if optimizer is None else optimizer.state.get(parameter, {})

    @property
    def optimizers(self) -> list[Optimizer]:
        """All that are alive."""
        alive = {id(o): o for o in (reference() for reference in self._latest.values()) if o is not None}
        return list(alive.values())


def _refuse_whole_tensors(optimizer: Optimizer) -> None:
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if name in WHOLE_TENSORS:
        raise ValueError(
            f"{name} scales updates by norms of whole tensors, but takes those of one rank's part where a tensor is "
            "sharded; use hecate.examples.adafactor.ShardedAdafactor, which takes those of each expert's matrix"
        )


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
            owners = self._new_owners(layers, pool, self._transport.topology)
            for layer in layers:
                layer.since_reshard[:] = 0
            move(pool, owners, self._tensors(pool), self._transport)

    def _new_owners(
        self, layers: Sequence[LayerPlanner], pool: ExpertPool, topology: Topology
    ) -> list[NDArray[np.int64]]:
        replicas = 1 if self._replicas is None else self._replicas.size()
        loads, settings = [], []
        for layer in layers:
            # Loads and settings must be the same in all replica groups, or they would choose different owners.
            *load, tokens = self._summed(np.append(layer.since_reshard, layer.tokens_per_device)).tolist()
            loads.append(np.array(load, dtype=np.int64))
            settings.append(layer.setting(tokens // replicas))
        if not any(load.any() for load in loads):
            return list(pool.owners)  # done for this step already, before an evaluation or a checkpoint
        owners = self._policy.reshard(tuple(settings), loads, pool.owners)
        chosen = Placement.from_owners(np.concatenate(owners), topology.num_devices)
        check_placements("re-sharding", (chosen,), dist.group.WORLD)  # type: ignore[arg-type]  # there is one here
        return owners

    def _summed(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Over replica groups."""
        if self._replicas is None:
            return values
        total = torch.from_numpy(values).to(self._layers[0].storage.pool.device)
        dist.all_reduce(total, group=self._replicas)
        return total.cpu().numpy()

    def _tensors(self, pool: ExpertPool) -> Iterator[Tensor]:
        """Tensors with a row per slot: parameters, pending gradients, optimizer state; in one order on all ranks."""
        for parameter in pool.parameters.values():
            yield local_tensor(parameter)
            if parameter.grad is not None:
                yield local_tensor(parameter.grad)
            state = self._watch.state_of(parameter)
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
    slot_before, slot_after = ({expert: slot for slot, expert in enumerate(held)} for held in (old, new))
    arriving = [e for e in new if e not in slot_before]
    kept = [(slot_before[e], slot_after[e]) for e in new if e in slot_before]
    for tensor in tensors:
        rows = tensor.view(pool.slots, -1)
        received = dict(zip(arriving, rows.new_empty(len(arriving), rows.shape[1]), strict=True))
        transport.gather(schedule, dict(zip(old, rows, strict=False)), received).wait()
        _shift(rows, kept)
        for expert, row in received.items():
            rows[slot_after[expert]].copy_(row)
        rows[len(new) :] = 0
    pool.set_owners(owners)


def _shift(rows: Tensor, kept: Sequence[tuple[int, int]]) -> None:
    """Move rows from slot to slot in place. Slots are sorted by expert before and after, so rows keep their order:
    none is overwritten before it moves if those that go down move in ascending order and those that go up descending.
    """
    for source, target in kept:
        if target < source:
            rows[target].copy_(rows[source])
    for source, target in reversed(kept):
        if target > source:
            rows[target].copy_(rows[source])
