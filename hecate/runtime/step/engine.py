"""Drives training steps: re-shard, plan all layers, train, and add loads to the history after the optimizer's step.

Plans change only between steps, so all passes of a step use the same plans on all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hecate.cost import CostModel
from hecate.placement import Placement
from hecate.private_torch import allow_data_parallel, refuse_data_parallel
from hecate.ranks.same import check_placements
from hecate.runtime.comms import WHOLE_STEP, Comms
from hecate.runtime.dense.base import Dense
from hecate.runtime.experts.buffers import SharedBuffers
from hecate.runtime.experts.kept import KeptCopies
from hecate.runtime.experts.optimizers import OptimizerWatch
from hecate.runtime.experts.slots import SlotsWatch
from hecate.runtime.plans.ahead import PlanAhead
from hecate.runtime.plans.foreseen import foreseen_counts
from hecate.runtime.plans.layer import LayerPlans
from hecate.runtime.plans.ownership import Resharded, Resharder
from hecate.runtime.plans.stats import LayerTotals, SummedLoads
from hecate.runtime.step.passes import Passes
from hecate.runtime.step.unchanged import Unchanged

__all__ = ["Engine"]

NOT_WRAPPED = (
    "a model under FSSDP cannot be wrapped in DistributedDataParallel: its gradients are reduced already. "
    "Use the model itself; with accelerate or Lightning Fabric, prepare everything but the model "
    "(accelerator.prepare(optimizer, loader), fabric.setup_optimizers(optimizer))"
)


class Engine:
    """Runs all MoE layers of one model on this device.

    Args:
        layers: plans of each MoE layer, in the order of the forward pass.
        passes: forward and backward passes of the model.
        comms: process groups, lanes and topology.
        dense: the dense part of the model.
        ahead: plans the copies of a step.
        resharder: changes owners between steps.
        watch: reports when an optimizer has stepped.
        slots: lowers the number of copies that devices may hold if memory is short.
        shared: the buffers of re-materialization, or None.
        device: the device of the experts.
        unchanged: checks that users have not changed the model.
        kept: per pool, copies that stay between steps; none if the policy keeps none.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlans],
        passes: Passes,
        comms: Comms,
        dense: Dense,
        ahead: PlanAhead,
        resharder: Resharder,
        watch: OptimizerWatch,
        slots: SlotsWatch,
        shared: SharedBuffers | None,
        device: torch.device,
        unchanged: Unchanged,
        kept: Sequence[KeptCopies],
    ) -> None:
        self.layers = tuple(layers)
        self.passes = passes
        self.comms = comms
        self.step = 0
        self._dense = dense
        self._ahead = ahead
        self._resharder = resharder
        self._watch = watch
        self._slots = slots
        self._device = device
        self._unchanged = unchanged
        self._kept = tuple(kept)
        self._shared = shared
        self._placements: list[Placement] | None = None  # of the step under way
        self._trains = False  # whether a pass with gradients has begun in it
        self._totals: list[LayerTotals] = []  # of the last step
        self._loads = SummedLoads([], None, device)  # of the last step
        self._exposed = comms.exposed.now  # of the last step
        self._planning_seconds = 0.0  # of the last step
        self._resharded = Resharded()  # before the last step
        self._stepped = False  # whether an optimizer has ever made a step
        self._hooks: list[RemovableHandle] = []
        self._model: nn.Module | None = None

    # The model's forward pass.

    def attach(self, model: nn.Module) -> None:
        """Register the hooks by which the engine runs with every forward pass of `model` and every optimizer step."""
        self._model = model
        self._watch.on_step(self.end_step)
        # `copy` and `pickle` look these methods up on the instance first. They could not copy the hooks below, which
        # refer to process groups.
        model.__deepcopy__ = model.__reduce_ex__ = _refuse_copy  # type: ignore[method-assign, assignment]
        refuse_data_parallel(model, NOT_WRAPPED)
        # These hooks run before FSDP2's own: what a failed pass left must be cleared first.
        self._hooks = [
            model.register_forward_pre_hook(lambda module, args: self.before_forward(), prepend=True),
            model.register_forward_hook(lambda module, args, output: self.after_forward(output)),
        ]

    def close(self) -> None:
        """Remove all hooks, so that the engine no longer runs with the model or its optimizer."""
        self._drop_plans()
        self._watch.close()
        for hook in self._hooks:
            hook.remove()
        if self._model is not None:
            del self._model.__deepcopy__, self._model.__reduce_ex__
            allow_data_parallel(self._model)
            self._model = None

    @torch.compiler.disable
    def before_forward(self) -> None:
        """Begin a micro-batch. The first one of a step also plans all layers."""
        if self.passes.recomputing:
            self._dense.enter()
            return
        self._unchanged.check()
        self.passes.recover()
        if self._watch.stepped_in_backward():
            self.end_step()
        # Inside one autocast region, a second pass would reuse cached casts of weights that FSDP2 has freed since, and
        # their gradients would be lost.
        torch.clear_autocast_cache()
        if torch.is_grad_enabled():
            self.passes.gradients.watch_hooks()
        # Ranks may free the graph of a dropped pass at different times. Leave first, so that the dense part starts
        # from the same state on all ranks.
        self._dense.leave_evaluation()
        self._dense.enter()
        placements = self._planned()
        self._trains |= torch.is_grad_enabled()
        # Inside an optimizer's step its closure runs the model, with other weights each time.
        accumulates = torch.is_grad_enabled() and self._stepped and not self._watch.stepping
        self.passes.begin_forward(self.step, placements, torch.is_grad_enabled(), accumulates)

    @torch.compiler.disable
    def after_forward(self, output: object) -> None:
        """End a forward pass. A backward pass, if one follows, may begin at any tensor in `output`."""
        if not self.passes.recomputing:
            self.passes.end_forward([t for t in _tensors(output) if t.requires_grad])

    def _planned(self) -> Sequence[Placement]:
        """Per layer, the placement of the pass that begins now; the first pass of a step plans them.

        Kept copies serve passes with gradients only: for others, weights may have been swapped (`hecate.ema`).
        """
        if torch.is_grad_enabled() and self._kept:
            if self._watch.stepping:
                raise RuntimeError("FSSDPConfig.policy='flexmoe': optimizers that take a closure are not supported")
            if not self._trains and self._change_kept():
                self._drop_plans()
        if self._placements is None:
            self._placements = self._begin_step()
        if self._kept and not torch.is_grad_enabled():
            return [layer.experts.owners for layer in self.layers]
        return self._placements

    def _change_kept(self) -> bool:
        """Before a step's first pass with gradients: drop kept copies that are stale, change them if it is time."""
        stale = [kept.drop_if_stale() for kept in self._kept]
        with self.comms.exposed.on_host("reshard"):
            return self._resharder.change_kept(self.step) or any(stale)

    def drop_kept(self) -> None:
        """Drop the copies that stay between steps: weights or optimizer state have been loaded. On all ranks."""
        for kept in self._kept:  # also without copies: owners may have changed
            kept.drop()
        if self._kept and self._placements is not None:
            self._placements = [layer.experts.owners for layer in self.layers]

    def _begin_step(self) -> list[Placement]:
        with self.comms.exposed.on_host("reshard"):
            self._resharder.before_step(self.step)
        self._slots.before_step()
        if self._shared is not None:
            self._shared.reserve(max(layer.experts.shared_bytes for layer in self.layers))
        with self.comms.exposed.on_host("plan"):
            placements = self._ahead.placements()
        for layer in self.layers:
            layer.foresee(None)  # it was about this step
        if self.comms.tokens is not None:
            check_placements(f"step {self.step}", tuple(placements), self.comms.tokens)
        return placements

    def foresee(self, counts: object) -> None:
        """Plan the next step from these loads, see `FSSDP.foresee`; planning begins at once. Collective."""
        names, experts = [layer.name for layer in self.layers], [layer.num_experts for layer in self.layers]
        for layer, loads in zip(self.layers, foreseen_counts(counts, names, experts, self.comms), strict=True):
            layer.foresee(loads)
        if not self._trains:  # passes without gradients may have begun the step; it begins anew
            self._drop_plans()
            self._ahead.start()

    # The end of a step.

    def end_step(self) -> None:
        """Called after the optimizer's step: add loads to the history; the next forward pass makes new plans."""
        self._stepped = True
        if self._placements is None:
            return
        self._drop_plans()
        self._totals = [layer.end_step() for layer in self.layers]
        counts = [total.counts.sum(axis=0) for total in self._totals]
        self._loads = SummedLoads(counts, self.comms.replicas, self._device)
        self._exposed = self.comms.exposed.take()
        self._planning_seconds, self._resharded = self._ahead.seconds, self._resharder.last
        self.layers[0].experts.arena.trim()
        self.comms.trim()
        self.step += 1

    def skip_step(self) -> None:
        """Drop the step under way, also if one of its passes raised. The next step starts from the same state."""
        self.passes.abandon_backward()
        self._drop_plans()
        for layer in self.layers:
            layer.drop_step()
        self.comms.exposed.take()

    def restart(self, step: int) -> None:
        """Continue at `step` with other weights or owners; drop the copies and plans of the present step."""
        self._drop_plans()
        self.step = step

    def resume(
        self, step: int, plans: Mapping[str, Mapping[str, NDArray[np.int64]]] | None, cost: CostModel | None
    ) -> None:
        """Continue at `step` of a saved run: set owners and load history, drop gradients. Call before loading weights.

        Args:
            step: optimizer steps that the saved run had made.
            plans: layer name -> `LayerPlans.state()` plus "owners"; None: no history.
            cost: cost model of the saved run if its mesh was equal to this one, else None. With it, the saved owners
                are used if the pools have room for them, and plans are the same as the saved run would have made.
                Otherwise owners are the initial ones.
        """
        self.restart(step)
        for pool in dict.fromkeys(layer.experts.pool for layer in self.layers):
            pool.set_owners(pool.initial_owners())
            if plans is not None and cost is not None:
                owners = [plans[spec.name]["owners"] for spec in pool.specs]
                pool.set_owners(owners if pool.fits(owners) else pool.owners)
        self.drop_kept()
        for layer in self.layers:
            layer.restart(None if plans is None else plans[layer.name], cost)
        self.passes.gradients.discard()
        for parameter in () if self._model is None else self._model.parameters():
            parameter.grad = None

    def _drop_plans(self) -> None:
        """Drop copies and plans at the end of a step: the weights change."""
        self.passes.end_step()
        if self._shared is not None:
            self._shared.evict()
        self._placements = None
        self._trains = False

    def report(self) -> dict[str, Any]:
        """What `FSSDP.stats()` returns of the last step, or before its end of the first step so far."""
        exposed = self._exposed if self._totals else self.comms.exposed.now
        layers = self._layers_report()
        times: dict[str, float] = {}
        for part in (exposed.by_verb(WHOLE_STEP), *(layer["exposed"] for layer in layers)):
            for verb, seconds in part.items():
                times[verb] = times.get(verb, 0.0) + seconds
        return {
            "layers": layers,
            "exposed": times,
            "planning_seconds": self._planning_seconds,
            "resharded": self._resharded._asdict(),
        }

    def _layers_report(self) -> list[dict[str, Any]]:
        totals = self._totals or [layer.totals for layer in self.layers]
        exposed = self._exposed if self._totals else self.comms.exposed.now
        loads = self.loads() or [total.counts.sum(axis=0) for total in totals]
        return [
            layer.report(total)
            | {"loads": loads[i], "exposed_seconds": exposed.seconds(i), "exposed": exposed.by_verb(i)}
            for i, (layer, total) in enumerate(zip(self.layers, totals, strict=True))
        ]

    def loads(self) -> list[NDArray[np.int64]]:
        """Per layer, int64 `[E]`: tokens per expert in the last step, over all ranks and replicas.

        Empty before the first step has ended.
        """
        return self._loads.result()


def _refuse_copy(*_: object) -> NoReturn:
    raise TypeError(
        "a model under FSSDP cannot be copied or pickled: its experts are on several ranks; copy it before "
        "hecate.fully_shard, keep model.state_dict(), or average weights with hecate.ema.ExpertAverage"
    )


def _tensors(output: object) -> Iterator[Tensor]:
    """All tensors in nested mappings, sequences and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (t for value in output.values() for t in _tensors(value))
    elif isinstance(output, list | tuple):
        yield from (t for value in output for t in _tensors(value))
    elif dataclasses.is_dataclass(output):
        yield from (t for field in dataclasses.fields(output) for t in _tensors(getattr(output, field.name)))
