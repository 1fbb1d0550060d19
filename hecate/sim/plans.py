"""Plans the layers of a simulated model as the engine plans those of a real one, with the same policies and routes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecate.collectives.route import Route, gather_route, reduce_route
from hecate.cost import LayerCost
from hecate.loads.history import LoadHistory
from hecate.placement import Placement, initial_owners
from hecate.planning.plan import Plan, copies_on
from hecate.planning.quota import sent_rows
from hecate.policies import Policy
from hecate.policies.base import LayerSetting
from hecate.sim.cluster import Cluster
from hecate.sim.model import ModelShape
from hecate.sim.network import Traffic, traffic_between
from hecate.sim.settings import Precision, Settings

__all__ = ["Layers", "PlannedLayer", "layer_cost"]

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PlannedLayer:
    """One layer of one step, ready to be timed.

    Attributes:
        plan: which device computes which tokens.
        ahead: traffic of the copies planned before the step.
        added: traffic of the copies added after the gate.
        again: traffic of all copies, when they are gathered a second time for backward.
        gradients: traffic of the gradients' way back.
        tokens: traffic of the dispatch.
        groups: int64 `[D]`, experts with rows on each device.
        copies: int64 `[D]`, copies that each device holds.
        shared: int64 `[D]`, experts with copies that each device holds, those that it owns included.
        before: the largest device load if nothing had been copied.
    """

    plan: Plan
    ahead: Traffic
    added: Traffic
    again: Traffic
    gradients: Traffic
    tokens: Traffic
    groups: Int64
    copies: Int64
    shared: Int64
    before: int


def layer_cost(model: ModelShape, cluster: Cluster, precision: Precision) -> LayerCost:
    """What the engine tells policies about a layer of this model."""
    return LayerCost(
        model=cluster.cost,
        expert_bytes=model.expert_weights * precision.param_bytes,
        gradient_bytes=model.expert_weights * precision.reduce_bytes,
        token_flops=6 * model.expert_weights,
        token_bytes=model.d_model * precision.param_bytes,
        dense_token_flops=2 * model.dense_weights,
    )


class Layers:
    """Plans all layers, step after step; owners, histories and settings are those of the engine.

    Args:
        model, cluster, settings: what is simulated.
        policy: plans.
        loads: per distinct layer, its counts, int64 `[D, E]` per step. If there are fewer than the model has layers,
            they are used in turn, and a plan serves all layers that are equal.

    Attributes:
        planning_ns: host time that planning and finding routes took in this process, so far, skipped steps left out. It
            is measured, so it differs from run to run, and enters no simulated time.
    """

    def __init__(
        self,
        model: ModelShape,
        cluster: Cluster,
        settings: Settings,
        policy: Policy,
        loads: Sequence[Iterator[Int64]],
    ) -> None:
        self._model, self._cluster, self._settings, self._policy = model, cluster, settings, policy
        self._loads = loads
        self._topology = cluster.topology
        devices, experts = self._topology.num_devices, model.num_experts
        self._owners = [initial_owners(experts, devices, i * experts) for i in range(len(loads))]
        self._history = [LoadHistory(devices, experts, settings.load_window) for _ in loads]
        self._since = [np.zeros(experts, dtype=np.int64) for _ in loads]
        self._cost = layer_cost(model, cluster, settings.precision)
        self._tokens = 0
        self._step = 0
        self.planning_ns = 0

    def step(self) -> tuple[list[PlannedLayer], Traffic | None]:
        """The layers of the next step, and the traffic of re-sharding before it, if owners change."""
        begin = time.perf_counter_ns()
        counts, moved = self._begin()
        planned = [self._layer(i, c) for i, c in enumerate(counts)]
        self._end(counts)
        self.planning_ns += time.perf_counter_ns() - begin
        return [planned[i % len(planned)] for i in range(self._model.num_layers)], moved

    def skip(self) -> None:
        """A step whose plans nobody asks for: owners and histories follow its loads, and later plans follow these."""
        counts, _ = self._begin()
        self._end(counts)

    def _begin(self) -> tuple[list[Int64], Traffic | None]:
        """The counts of the next step, and the traffic of re-sharding before it."""
        return [next(load) for load in self._loads], self._reshard()

    def _end(self, counts: Sequence[Int64]) -> None:
        """Add the step to the histories."""
        for i, count in enumerate(counts):
            self._history[i].add(count)
            self._history[i].close_step()
            self._since[i] += count.sum(axis=0)
        self._tokens = int(counts[0].sum()) // (self._topology.num_devices * self._model.top_k)
        self._step += 1

    def _setting(self, tokens: int) -> LayerSetting:
        settings = self._settings
        return LayerSetting(
            topology=self._topology,
            cost=self._cost,
            memory_slots=0 if settings.policy == "ep" else min(settings.memory_slots, self._model.num_experts),
            max_imbalance=settings.max_imbalance,
            overlap_degree=settings.overlap_degree,
            calibrate=settings.calibrate,
            tokens_per_device=tokens,
        )

    def _layer(self, i: int, counts: Int64) -> PlannedLayer:
        owners, steps = self._owners[i], self._history[i].steps
        start = Placement.from_owners(owners, self._topology.num_devices)
        if self._settings.foreseen:
            steps = (counts,)
        ahead = start
        if steps:
            tokens = int(steps[-1].sum()) // (self._topology.num_devices * self._model.top_k)
            ahead = self._policy.materialize(self._setting(tokens), np.stack(steps), owners)
        now = self._setting(int(counts.sum()) // (self._topology.num_devices * self._model.top_k))
        placement = self._policy.calibrate(now, counts, owners, ahead)
        plan = self._policy.assign(now, counts, owners, placement)
        gather = self._gather(start, ahead)
        extra = self._gather(start, (placement - ahead) | start) if placement != ahead else self._none()
        again = gather if placement == ahead else self._gather(start, placement)
        devices = self._topology.num_devices
        before = np.bincount(owners, weights=counts.sum(axis=0), minlength=devices)
        holders = placement.matrix.sum(axis=1)  # of each expert
        rows = sent_rows(plan.holders, plan.quota, devices)
        return PlannedLayer(
            plan=plan,
            ahead=gather,
            added=extra,
            again=again,
            gradients=self._reduce(placement, start),
            tokens=traffic_between(rows * self._cost.token_bytes, self._cluster),
            groups=_groups(plan),
            copies=copies_on(placement, owners),
            shared=placement.matrix[holders > 1].sum(axis=0),
            before=int(before.max()),
        )

    def _gather(self, start: Placement, placement: Placement) -> Traffic:
        if placement == start:
            return self._none()
        chunk = self._cost.expert_bytes
        return self._carried(gather_route(start, placement, self._topology, self._cluster.links, chunk), chunk, chunk)

    def _reduce(self, placement: Placement, start: Placement) -> Traffic:
        if placement == start:
            return self._none()
        chunk = self._cost.gradient_bytes
        partial = self._model.expert_weights * max(4, self._settings.precision.reduce_bytes)
        route = reduce_route(placement, start, self._topology, self._cluster.links, chunk, partial)
        return self._carried(route, chunk, partial)

    def _carried(self, route: Route, chunk: int, partial: int) -> Traffic:
        """The traffic of a route's hops."""
        _, _, piece, pieces, src, dst, _, is_partial, *_ = route.hops.T
        whole = np.where(is_partial > 0, partial, chunk)
        size = whole * (piece + 1) // pieces - whole * piece // pieces
        sent, messages = np.zeros((2, *(self._topology.num_devices,) * 2), dtype=np.int64)
        np.add.at(sent, (src, dst), size)
        np.add.at(messages, (src, dst), 1)
        return traffic_between(sent, self._cluster, route.predicted_ns, self._cluster.message_ns, messages)

    def _none(self) -> Traffic:
        return traffic_between(np.zeros((self._topology.num_devices,) * 2, dtype=np.int64), self._cluster)

    def _reshard(self) -> Traffic | None:
        interval = self._settings.reshard_interval
        if not interval or not self._step or self._step % interval:
            return None
        before = self._owners
        setting = self._setting(self._tokens)
        self._owners = self._policy.reshard([setting] * len(before), self._since, before)
        self._since = [np.zeros_like(load) for load in self._since]
        sent = np.zeros((self._topology.num_devices,) * 2, dtype=np.int64)
        layers = np.bincount(np.arange(self._model.num_layers) % len(before))
        for number, old, new in zip(layers, before, self._owners, strict=True):
            np.add.at(sent, (old, new), int(number) * self._model.expert_weights * self._settings.precision.state_bytes)
        np.fill_diagonal(sent, 0)
        return traffic_between(sent, self._cluster) if sent.any() else None


def _groups(plan: Plan) -> Int64:
    used = plan.quota.sum(axis=0) > 0
    return np.bincount(plan.holders[used, 1], minlength=plan.topology.num_devices)
