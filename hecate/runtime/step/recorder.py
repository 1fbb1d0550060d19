"""Makes the record of an MoE layer: exchanges counts, plans, and decides where rows go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hecate.labels import label
from hecate.ops.permute import sort_by_expert
from hecate.placement import Placement
from hecate.planning.plan import Plan
from hecate.ranks.same import debugging
from hecate.runtime.comms import Comms
from hecate.runtime.plans.layer import LayerPlans
from hecate.runtime.step.micro_batch import MicroBatch
from hecate.runtime.step.record import LayerRecord, Planned
from hecate.runtime.tokens.counts import ABSENT, RECOMPUTED, Counting, Position
from hecate.runtime.tokens.dispatch import ByKernels, dispatch_of
from hecate.runtime.tokens.on_device import check_capacity, device_dispatch

__all__ = ["Recorder", "Where"]


class Where(NamedTuple):
    """Which call of which layer a record is of; see `Position`."""

    step: int
    layer: int
    call: int


class Recorder:
    """Makes the records of all layers of a model.

    Args:
        layers: plans of each MoE layer, in the order of the forward pass.
        comms: process groups, lanes and topology.
    """

    def __init__(self, layers: Sequence[LayerPlans], comms: Comms) -> None:
        self._layers = tuple(layers)
        self._names = [layer.name for layer in layers]
        self._experts = [layer.num_experts for layer in layers]
        self._comms = comms

    def record(
        self, micro_batch: MicroBatch, where: Where, ahead: Placement, index: Tensor, weights: Tensor
    ) -> LayerRecord:
        """Plan one call of a layer for these tokens. Collective.

        Args:
            micro_batch: the tokens' micro-batch.
            where: the call.
            ahead: the placement that was planned before the tokens were known.
            index: `[T, k]` experts of this device's tokens; -1: none.
            weights: `[T, k]` router weights.
        """
        plans, comms = self._layers[where.layer], self._comms
        kernels = plans.experts.kernels
        trained = sum(p.requires_grad << i for i, p in enumerate(plans.experts.pool.parameters.values()))
        position = Position(*where, micro_batch.with_grad, trained)
        if plans.device_splits and micro_batch.with_grad and where.call != RECOMPUTED:  # a backward pass checks counts
            return self._record_on_device(micro_batch, position, ahead, index, weights)
        with comms.exposed.on_host("count", where.layer, plans.name):
            counting = Counting(position, index, weights, self._experts, comms, kernels)
            # While the counts are on their way. The kernel that sorts needs the plan.
            by_expert = None if kernels else sort_by_expert(index, plans.num_experts)
            counts, tokens = counting.wait(self._names)
        with label("gather", plans.name):  # after the ranks have found that they are in the same layer
            copies = micro_batch.launch(plans.experts, ahead)
        with comms.exposed.on_host("plan", where.layer, plans.name):
            plan = plans.plan(counts, copies.placement, max(1, index.shape[1]), settled=copies.settled)
        if debugging():
            plans.check(plan)
        if plan.placement != copies.placement:
            copies.extend(plan.placement)
        dtypes, counted = plans.experts.dtypes, counting.counted
        ways = None if counted is None else ByKernels(counted, dtypes.param)
        dispatch = dispatch_of(
            plan,
            index,
            comms,
            copies.experts,
            plans.cost,
            dtypes.wire,
            by_expert,
            tokens,
            ways,
            plans.token_halves,
        )
        absent = index == ABSENT if counts[comms.rank].sum() < index.numel() else None
        return LayerRecord(max(1, index.shape[1]), Planned(lambda: (counts, plan)), dispatch, copies, absent)

    def _record_on_device(
        self, micro_batch: MicroBatch, position: Position, ahead: Placement, index: Tensor, weights: Tensor
    ) -> LayerRecord:
        """`record` without a wait of the host: it gets counts and plan when the backward pass begins."""
        plans, comms, top_k = self._layers[position.layer], self._comms, max(1, index.shape[1])
        with comms.exposed.on_host("count", position.layer, plans.name):
            counting = Counting(position, index, weights, self._experts, comms, by_kernels=True)
            counting.send_to_host()
        with label("gather", plans.name):
            copies = micro_batch.launch(plans.experts, ahead)
        placement, dtypes, capacity = copies.placement, plans.experts.dtypes, plans.rows_per_pair
        assert counting.counted is not None
        with comms.exposed.on_host("plan", position.layer, plans.name):
            dispatch = device_dispatch(
                placement,
                counting.on_device,
                index,
                comms,
                copies.experts,
                dtypes.param,
                dtypes.wire,
                counting.counted,
                capacity,
            )

        def plan() -> tuple[NDArray[np.int64], Plan]:
            with comms.exposed.on_host("count", position.layer, plans.name):
                counts, _ = counting.wait(self._names)
            plan = plans.plan(counts, placement, top_k, settled=True)
            check_capacity(plans.name, plan, capacity)
            if debugging():
                plans.check(plan)
            return counts, plan

        return LayerRecord(top_k, Planned(plan), dispatch, copies, index == ABSENT)
