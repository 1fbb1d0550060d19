"""Builds all parts of an engine from a `Setup`, and puts the model on them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from hecate.adapters.shared import shared_experts_of
from hecate.private_torch import default_store
from hecate.ranks.heartbeat import Heartbeat
from hecate.runtime.arena import Arena
from hecate.runtime.comms import Comms, make_comms
from hecate.runtime.dense.base import Dense
from hecate.runtime.dense.make import make_dense, move_dense
from hecate.runtime.experts.buffers import SharedBuffers
from hecate.runtime.experts.kept import KeptCopies
from hecate.runtime.experts.moving_state import MovingState
from hecate.runtime.experts.optimizer_states import OptimizerStates
from hecate.runtime.experts.optimizers import OptimizerWatch
from hecate.runtime.experts.pool import ExpertPool, make_pools
from hecate.runtime.experts.pooled_lora import pass_through
from hecate.runtime.experts.slots import SlotsWatch, reserved_memory
from hecate.runtime.plans.ahead import PlanAhead, PlanningThreads, number_of_threads
from hecate.runtime.plans.layer import LayerPlans, make_plans
from hecate.runtime.plans.ownership import Resharder
from hecate.runtime.setup import Setup
from hecate.runtime.step.engine import Engine
from hecate.runtime.step.layer import FSSDPExperts
from hecate.runtime.step.passes import Passes
from hecate.runtime.step.shared_experts import SharedExperts
from hecate.runtime.step.unchanged import Unchanged
from hecate.values.initialize import Stack

__all__ = ["Parts", "assemble"]


@dataclass(frozen=True)
class Parts:
    """The parts of one engine.

    Attributes:
        comms: process groups and lanes.
        pools: the pools of owned experts.
        dense: the rest of the model.
        experts: the modules that replaced the model's experts modules, one per layer.
        watch: reports steps of optimizers.
        threads: plan the copies of a step.
        resharder: changes owners between steps.
        copies_memory: memory for copies and for casts of owned rows.
        kept: per pool, copies that stay between steps; none if the policy keeps none.
        engine: runs all of these.
    """

    comms: Comms
    pools: list[ExpertPool]
    dense: Dense
    experts: tuple[FSSDPExperts, ...]
    watch: OptimizerWatch
    threads: PlanningThreads
    resharder: Resharder
    copies_memory: Arena
    kept: list[KeptCopies]
    engine: Engine

    def took_weights(self, masters: Mapping[nn.Parameter, Tensor] | None = None) -> None:
        """Call it when parameters have new values; see `Dense.took_weights`."""
        self.dense.took_weights(masters)
        self.engine.drop_kept()

    def stacks(self) -> list[Stack]:
        """The rows of stacked weights that this device owns, per experts module."""
        return [stack for pool in self.pools for stack in pool.stacks()]


def assemble(setup: Setup, model: nn.Module) -> Parts:
    """Move the experts of `model` into pools, shard or replicate the rest, and make what runs them. Collective.

    The model does not run under the engine before `Engine.attach`.
    """
    before = [weakref.ref(p) for p in model.parameters()]
    comms = _connect(setup)
    copies_memory = Arena(setup.device)
    move_dense(setup, model)
    pools = make_pools(setup, model, comms.rank)
    rematerialize = setup.config.rematerialize and setup.num_devices > 1
    shared = SharedBuffers(copies_memory) if rematerialize else None
    layers = make_plans(setup, model, pools, comms, shared, copies_memory)
    slots = SlotsWatch(setup, [layer.experts for layer in layers], shared, copies_memory)
    slots.lower(reserved_memory(setup, model, pools))
    experts = tuple(FSSDPExperts.take_over(layer.module, layer.index, layer.spec) for layer in setup.layers)
    dense = make_dense(setup, model, [p for pool in pools for p in pool.parameters.values()])
    watch, resharder = _follow_optimizers(setup, model, pools, layers, comms, before)
    kept = _keep_copies(setup, pools, layers, comms, watch)
    threads = PlanningThreads(number_of_threads(setup.config.planning_threads, comms.topology.devices_per_node))
    ahead = PlanAhead(layers, threads)
    gemm = setup.config.expert_gemm
    shared_experts = SharedExperts(_shared_experts(setup, model))
    passes = Passes(layers, comms, dense, ahead, rematerialize, gemm, shared_experts)
    unchanged = Unchanged(model, pools)
    engine = Engine(layers, passes, comms, dense, ahead, resharder, watch, slots, shared, setup.device, unchanged, kept)
    for module in experts:
        module.connect(engine)
    for layer in setup.layers:
        pass_through(layer.wrappers)
    watch.on_load(engine.drop_kept)
    return Parts(comms, pools, dense, experts, watch, threads, resharder, copies_memory, kept, engine)


def _connect(setup: Setup) -> Comms:
    heart = None if setup.mesh is None else Heartbeat(default_store(), dist.get_rank(), dist.get_world_size())
    wires = [layer.dtypes.reduce for layer in setup.layers]
    return make_comms(setup.mesh, setup.device, setup.cost, heart, setup.config.transport, wires)


def _shared_experts(setup: Setup, model: nn.Module) -> dict[int, nn.Module]:
    """Layer index -> shared experts of the layer; none on one device, where no tokens travel."""
    if setup.num_devices == 1:
        return {}
    found = {layer.index: shared_experts_of(layer.spec.name, model) for layer in setup.layers}
    return {index: module for index, module in found.items() if module is not None}


def _keep_copies(
    setup: Setup, pools: Sequence[ExpertPool], layers: Sequence[LayerPlans], comms: Comms, watch: OptimizerWatch
) -> list[KeptCopies]:
    """Memory for copies that stay between steps, if the policy keeps any; they step with the caller's optimizers."""
    made = []
    for pool in pools if setup.policy.keeps and setup.num_devices > 1 else ():
        own = [layer.experts for layer in layers if layer.experts.pool is pool]
        kept = KeptCopies(pool, [experts.memory_slots for experts in own], comms, own[0].index)
        for experts in own:
            experts.kept = kept
        watch.before_step(kept.step)
        watch.on_step(kept.stepped)
        made.append(kept)
    return made


def _follow_optimizers(
    setup: Setup,
    model: nn.Module,
    pools: Sequence[ExpertPool],
    layers: Sequence[LayerPlans],
    comms: Comms,
    before: Sequence[weakref.ref[nn.Parameter]],
) -> tuple[OptimizerWatch, Resharder]:
    """What reports steps of optimizers, and what moves their state; `before` are the parameters before sharding."""
    present = {id(p) for p in model.parameters()}
    states = OptimizerStates(pools, comms)
    watch = OptimizerWatch(model, pools, states, [p for p in before if id(p()) not in present])
    moving = MovingState(pools, states)
    return watch, Resharder(layers, setup.policy, watch, moving, comms, setup.config.reshard_interval)
