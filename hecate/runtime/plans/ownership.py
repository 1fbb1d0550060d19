"""Who owns which expert: re-sharding, decided for all layers at once (paper, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hecate.placement import Placement
from hecate.policies.base import Policy
from hecate.ranks.same import check_placements
from hecate.runtime.comms import Comms
from hecate.runtime.experts.move import move
from hecate.runtime.experts.optimizers import OptimizerWatch
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.plans.layer import LayerPlans
from hecate.values.local import local_tensor

__all__ = ["Resharder"]


class Resharder:
    """Re-shards every `interval` steps, all pools and layers at once.

    Args:
        layers: of the model, in order.
        policy: decides the new owners.
        watch: knows the optimizers whose state moves with the experts.
        comms: carry the rows; among replicas, ownership must agree and loads are summed.
        interval: optimizer steps; 0 never.
    """

    def __init__(
        self, layers: Sequence[LayerPlans], policy: Policy, watch: OptimizerWatch, comms: Comms, interval: int
    ) -> None:
        self._layers = tuple(layers)
        self._policy = policy
        self._watch = watch
        self._comms = comms
        self._interval = interval

    def before_step(self, step: int) -> None:
        """Move ownership if `step` optimizer steps are a whole number of intervals. Collective."""
        transport = self._comms.experts
        if transport is None or not self._interval or not step or step % self._interval:
            return
        for pool in dict.fromkeys(layer.experts.pool for layer in self._layers):
            layers = [layer for layer in self._layers if layer.experts.pool is pool]
            owners = self._new_owners(layers, pool)
            for layer in layers:
                layer.since_reshard[:] = 0
            move(pool, owners, self._tensors(pool), transport)

    def _new_owners(self, layers: Sequence[LayerPlans], pool: ExpertPool) -> list[NDArray[np.int64]]:
        replicas = 1 if self._comms.replicas is None else self._comms.replicas.size()
        loads, settings = [], []
        for layer in layers:
            # Loads and settings must be the same in all replica groups, or they would choose different owners.
            *load, tokens = self._summed(np.append(layer.since_reshard, layer.tokens_per_device)).tolist()
            loads.append(np.array(load, dtype=np.int64))
            settings.append(layer.setting(tokens // replicas))
        if not any(load.any() for load in loads):
            return list(pool.owners)  # done for this step already, before an evaluation or a checkpoint
        owners = self._policy.reshard(tuple(settings), loads, pool.owners)
        chosen = Placement.from_owners(np.concatenate(owners), pool.num_devices)
        check_placements("re-sharding", (chosen,), dist.group.WORLD)  # type: ignore[arg-type]  # there is one here
        return owners

    def _summed(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Over replica groups."""
        if self._comms.replicas is None:
            return values
        total = torch.from_numpy(values).to(self._layers[0].experts.pool.device)
        dist.all_reduce(total, group=self._comms.replicas)
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
