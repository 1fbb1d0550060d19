"""Plans of one layer: asks the policy, keeps the load history, counts what happened. Sends nothing to other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hecate.config import FSSDPConfig, TokenHalves
from hecate.cost import CostModel, LayerCost
from hecate.experts import POOL_PREFIX, ExpertsSpec
from hecate.loads.history import LoadHistory
from hecate.placement import Placement
from hecate.planning.plan import Calibration, Plan
from hecate.policies.base import LayerSetting, Policy, Weighing
from hecate.ranks.same import check_same
from hecate.runtime.arena import Arena
from hecate.runtime.comms import Comms
from hecate.runtime.experts.buffers import MOMENTS_BYTES, SharedBuffers, memory_slots
from hecate.runtime.experts.casts import CastWatch
from hecate.runtime.experts.layer import LayerExperts
from hecate.runtime.experts.layout import ChunkLayout
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.plans.reasons import why_no_copies
from hecate.runtime.plans.stats import LayerTotals
from hecate.runtime.setup import Setup

__all__ = ["LayerPlans", "Outlook", "layer_cost", "make_plans"]


def layer_cost(model: CostModel, spec: ExpertsSpec, experts: LayerExperts, dense_token_flops: int) -> LayerCost:
    """Cost of an expert and a token of this layer: per weight and token, 2 operations in forward and 4 in backward."""
    weights = sum(int(np.prod(w.shape)) for w in spec.weights)
    return LayerCost(
        model=model,
        expert_bytes=experts.layout.numel * experts.dtypes.param.itemsize,
        gradient_bytes=experts.gradient_layout().numel * experts.dtypes.reduce.itemsize,
        token_flops=6 * weights,
        token_bytes=spec.width * experts.dtypes.token.itemsize,
        dense_token_flops=dense_token_flops,
    )


@dataclass(frozen=True, eq=False)
class Outlook:
    """All inputs from which the copies of one layer for one step are planned; see `Policy.materialize`.

    Attributes:
        policy, setting: what plans, and what it is told about the layer.
        steps: int64 `[D, E]` per past step, oldest first. They are stacked by the thread that plans.
        owners: int64 `[E]`.
        kept: owners, and copies that stay between steps.
        experts: the layer's experts.
    """

    policy: Policy
    setting: LayerSetting
    steps: tuple[NDArray[np.int64], ...]
    owners: NDArray[np.int64]
    kept: Placement
    experts: LayerExperts

    def placement(self) -> Placement:
        """The placement before the layer runs, kept copies included; without any history, no others.

        The routes of its copies are made too, so that the thread that launches the gather and the reduction finds them.
        """
        owners = Placement.from_owners(self.owners, self.setting.topology.num_devices)
        if not self.steps:
            return self.kept
        placement = self.policy.materialize(self.setting, np.stack(self.steps), self.owners)
        placement = placement if self.kept <= placement else placement | self.kept
        self.experts.make_routes(owners, placement)
        return placement

    def equals(self, other: Outlook) -> bool:
        """Whether `other` leads to the same placement."""
        same = len(self.steps) == len(other.steps) and np.array_equal(self.owners, other.owners)
        pairs = zip(self.steps, other.steps, strict=False)
        same = same and self.kept == other.kept
        return same and self.setting == other.setting and all(a is b or np.array_equal(a, b) for a, b in pairs)


class LayerPlans:
    """Makes the plans of one layer from its past loads.

    Attributes:
        name: name of the layer's experts module in the model.
        num_experts: number of experts of the layer.
        experts: the layer's experts in the pool.
        history: loads of the last steps.
        since_reshard: int64 `[num_experts]`, loads since the last re-sharding.
    """

    def __init__(
        self, spec: ExpertsSpec, experts: LayerExperts, policy: Policy, config: FSSDPConfig, cost: LayerCost
    ) -> None:
        self.name = spec.name
        self.num_experts = spec.num_experts
        self.experts = experts
        self.history = LoadHistory(experts.comms.topology.num_devices, spec.num_experts, config.load_window)
        self.since_reshard = np.zeros(spec.num_experts, dtype=np.int64)
        self._policy = policy
        self._weighing = policy if isinstance(policy, Weighing) else None  # once: the check takes microseconds
        self._config = config
        self._cost = cost
        self._tokens_per_device = 0
        self._foreseen: NDArray[np.int64] | None = None
        self._totals = self._no_totals()

    @property
    def owners(self) -> NDArray[np.int64]:
        """int64 `[num_experts]`: the owner of each expert."""
        return self.experts.pool.owners[self.experts.place]

    @property
    def device_splits(self) -> bool:
        """Whether the layer runs without the host knowing its counts; see `FSSDPConfig.splits`."""
        return self._config.splits == "device"

    @property
    def rows_per_pair(self) -> int | None:
        """See `FSSDPConfig`."""
        return self._config.rows_per_pair

    @property
    def token_halves(self) -> TokenHalves:
        """See `FSSDPConfig`."""
        return self._config.token_halves

    @property
    def cost(self) -> LayerCost:
        """Cost of an expert and a token of this layer."""
        return self._cost

    def setting(self, tokens_per_device: int) -> LayerSetting:
        """What the policy is told about the layer, the devices and the settings."""
        config = self._config
        return LayerSetting(
            topology=self.experts.comms.topology,
            cost=self._cost,
            memory_slots=self.experts.memory_slots,
            max_imbalance=config.max_imbalance,
            overlap_degree=config.overlap_degree,
            calibrate=config.calibrate,
            tokens_per_device=tokens_per_device,
        )

    @property
    def totals(self) -> LayerTotals:
        """Totals of the step that is under way."""
        return self._totals

    @property
    def tokens_per_device(self) -> int:
        """Mean tokens per device and micro-batch in the last step."""
        return self._tokens_per_device

    def foresee(self, counts: NDArray[np.int64] | None) -> None:
        """Plan the next step's copies from `counts`, int64 `[D, E]`, instead of the history; None: from the history."""
        self._foreseen = counts

    def outlook(self) -> Outlook:
        """What the next step is planned from: foreseen loads, or the history and the micro-batches booked so far."""
        steps, tokens = self.history.steps, self._tokens_per_device
        if self._totals.micro_batches:
            steps = (*steps, self._totals.counts)[-self._config.load_window :]
            tokens = self._totals.tokens_per_device
        if self._foreseen is not None:
            steps = (self._foreseen,)
            # Before the first step nobody knows top_k; then a row counts as a token. That costs time at most.
            tokens = tokens or int(self._foreseen.sum()) // len(self._foreseen)
        kept = self.experts.kept_placement
        return Outlook(self._policy, self.setting(tokens), steps, self.owners, kept, self.experts)

    def plan(self, counts: NDArray[np.int64], held: Placement, top_k: int, settled: bool = False) -> Plan:
        """Plan which device computes which tokens of one call in one micro-batch.

        Args:
            counts: int64 `[D, E]`, tokens that each device routed to each expert in this micro-batch.
            held: the placement that is gathered already; that of the plan may have further copies.
            top_k: experts per token.
            settled: plan no further copies, because an earlier call of the same pass has used the present ones.
        """
        setting = self.setting(int(counts.sum()) // (counts.shape[0] * top_k))
        owners = self.owners
        calibration = Calibration(held, held) if settled else self._calibration(setting, counts, owners, held)
        return replace(self._policy.assign(setting, counts, owners, calibration.placement), calibration=calibration)

    def _calibration(
        self, setting: LayerSetting, counts: NDArray[np.int64], owners: NDArray[np.int64], held: Placement
    ) -> Calibration:
        if self._weighing is not None:
            return self._weighing.weigh(setting, counts, owners, held)
        return Calibration(held, self._policy.calibrate(setting, counts, owners, held))

    def check(self, plan: Plan) -> None:
        """For HECATE_DEBUG=1: raise if the plan is not valid, or not the same on all ranks. Collective."""
        plan.validate()
        if (group := self.experts.comms.tokens) is not None:
            check_same(self.name, {"plan digest": plan.digest()}, group, "make the same plan", RuntimeError)

    def book(self, counts: NDArray[np.int64], plan: Plan, top_k: int) -> None:
        """Add a micro-batch that is trained on to the step's totals."""
        self._totals.add(counts, plan, top_k)

    def report(self, totals: LayerTotals) -> dict[str, Any]:
        """`totals` of one step in the form that `FSSDP.stats()` returns."""
        setting = self.setting(totals.tokens_per_device)
        found = totals.report(self.name, setting)
        if totals.last is not None and not totals.last.copies:
            found["no_copies"] = why_no_copies(totals.last, setting, self._policy, bool(totals.planned_from))
        return found

    def planned_from(self, steps: Sequence[NDArray[np.int64]]) -> None:
        """The copies of the step that begins now were planned from the counts of these steps."""
        self._totals.planned_from = tuple(steps)

    def end_step(self) -> LayerTotals:
        """Add the step's loads to the history; returns its totals."""
        totals, self._totals = self._totals, self._no_totals()
        totals.bytes_sent = self.experts.take_bytes_sent()
        if totals.micro_batches:
            self.history.add(totals.counts)
            self.history.close_step()
            self.since_reshard = self.since_reshard + totals.counts.sum(axis=0)
            self._tokens_per_device = totals.tokens_per_device
        return totals

    def drop_step(self) -> None:
        """Drop what was booked since the last step."""
        self._totals = self._no_totals()
        self.experts.take_bytes_sent()

    def state(self) -> dict[str, NDArray[np.int64]]:
        """What plans are made from, except `owners`, as int64 arrays; `history` is `[steps, D, E]`."""
        return {
            "history": self.history.array(),
            "since_reshard": self.since_reshard.copy(),
            "tokens_per_device": np.array(self._tokens_per_device, dtype=np.int64),
            "slots": np.array(self.experts.memory_slots, dtype=np.int64),
        }

    def restart(self, state: Mapping[str, NDArray[np.int64]] | None, cost: CostModel | None) -> None:
        """Continue from another run.

        Args:
            state: `state()` of that run, on any number of devices; None: no history.
            cost: cost model of that run, to make exactly the plans that it would have made; its number of memory slots
                is then used too if this run's is "auto". None keeps the present cost model and memory slots.
        """
        devices = self.experts.comms.topology.num_devices
        self.history = LoadHistory(devices, self.num_experts, self._config.load_window)
        self.since_reshard = np.zeros(self.num_experts, dtype=np.int64)
        self._tokens_per_device = 0
        self._foreseen = None
        self.drop_step()
        if state is not None:
            for counts in state["history"]:
                self.history.add(_spread(counts, devices))
                self.history.close_step()
            self.since_reshard += state["since_reshard"]
            self._tokens_per_device = int(state["tokens_per_device"])
        if state is not None and cost is not None:
            self._cost = replace(self._cost, model=cost)
            if self._config.memory_slots == "auto" and self.experts.memory_slots and state["slots"]:
                self.experts.memory_slots = int(state["slots"])

    def _no_totals(self) -> LayerTotals:
        devices = self.experts.comms.topology.num_devices
        return LayerTotals(np.zeros((devices, self.num_experts), dtype=np.int64))


def _spread(counts: NDArray[np.int64], devices: int) -> NDArray[np.int64]:
    """`counts` `[D, E]`; if D is not `devices`, each expert's load is spread evenly over `devices`."""
    if len(counts) == devices:
        return counts
    each, rest = np.divmod(counts.sum(axis=0), devices)
    return each + (np.arange(devices)[:, None] < rest)


def make_plans(
    setup: Setup,
    model: nn.Module,
    pools: Sequence[ExpertPool],
    comms: Comms,
    shared: SharedBuffers | None,
    arena: Arena,
) -> list[LayerPlans]:
    """Make one `LayerPlans` per layer, in order. Collective.

    Args:
        setup: the inspected model and config.
        model: the model with pools, before its dense part is sharded.
        pools: the pools that own the experts.
        comms: process groups of the devices that share the experts.
        shared: the buffers of re-materialization, or None.
        arena: memory for copies and for casts of owned rows.
    """
    dense_flops = _dense_flops(setup, model)
    watches = {pool: CastWatch(pool) for pool in pools}
    made = []
    for layer in setup.layers:
        pool = next(p for p in pools if layer.spec in p.specs)
        numel = ChunkLayout(layer.spec.weights).numel
        copy_bytes = numel * layer.dtypes.param.itemsize
        if setup.policy.keeps:  # a weight, its gradient and its optimizer state
            copy_bytes = numel * (2 * layer.dtypes.param.itemsize + MOMENTS_BYTES)
        slots = memory_slots(setup, layer.spec.num_experts, copy_bytes, comms.topology.devices_per_node)
        place = pool.specs.index(layer.spec)
        name = layer.spec.name
        watch = watches[pool]
        experts = LayerExperts(
            layer.index, name, pool, place, layer.dtypes, comms, slots, shared, arena, watch, setup.kernels
        )
        cost = layer_cost(setup.cost, layer.spec, experts, dense_flops)
        made.append(LayerPlans(layer.spec, experts, setup.policy, setup.config, cost))
    return made


def _dense_flops(setup: Setup, model: nn.Module) -> int:
    """Forward operations per token of the dense part before one MoE layer, on average: 2 per weight.

    Embeddings are left out: they are only looked up.
    """
    apart = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | setup.stacked()
    parameters = ((n, p) for n, p in model.named_parameters() if not n.startswith(POOL_PREFIX))
    return 2 * sum(p.numel() for _, p in parameters if id(p) not in apart) // len(setup.layers)
