"""The clock of steps: re-shard, plan all layers, train, and turn loads into history when the optimizer has stepped.

Plans change between steps only, so that every pass of a step sees the same ones on all ranks.
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
from hecate.labels import label
from hecate.placement import Placement
from hecate.ranks.same import check_placements
from hecate.runtime.comms import Comms, ExposedTime
from hecate.runtime.dense.base import Dense
from hecate.runtime.experts.buffers import SharedBuffers
from hecate.runtime.experts.optimizers import OptimizerWatch
from hecate.runtime.plans.ahead import PlanAhead
from hecate.runtime.plans.layer import LayerPlans
from hecate.runtime.plans.ownership import Resharder
from hecate.runtime.plans.stats import LayerTotals, SummedLoads
from hecate.runtime.step.passes import Passes
from hecate.runtime.step.unchanged import Unchanged

__all__ = ["Engine"]


class Engine:
    """Runs all MoE layers of one model on this device.

    Args:
        layers: in the order of the forward pass.
        passes: of the model.
        comms: process groups, lanes and topology.
        dense: the rest of the model.
        ahead: plans the copies of a step.
        resharder: moves owners between steps.
        watch: knows when an optimizer has stepped.
        shared: the buffers of re-materialization, or None.
        device: of the experts.
        unchanged: notices what users do to the model.
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
        shared: SharedBuffers | None,
        device: torch.device,
        unchanged: Unchanged,
    ) -> None:
        self.layers = tuple(layers)
        self.passes = passes
        self.comms = comms
        self.step = 0
        self._dense = dense
        self._ahead = ahead
        self._resharder = resharder
        self._watch = watch
        self._device = device
        self._unchanged = unchanged
        self._shared = shared
        self._placements: list[Placement] | None = None  # of the step under way
        self._totals: list[LayerTotals] = []  # of the last step
        self._loads = SummedLoads([], None, device)  # of the last step
        self._exposed = ExposedTime()
        self._hooks: list[RemovableHandle] = []
        self._model: nn.Module | None = None

    # The model's forward pass.

    def attach(self, model: nn.Module) -> None:
        """Run with every forward pass of `model` and every step of its optimizer."""
        self._model = model
        self._watch.on_step(self.end_step)
        # Instance attributes come first for `copy` and `pickle`; the hooks below lead to process groups.
        model.__deepcopy__ = model.__reduce_ex__ = _refuse_copy  # type: ignore[method-assign, assignment]
        # Before FSDP2's own hook: what a failed pass left must be cleared first.
        self._hooks = [
            model.register_forward_pre_hook(lambda module, args: self.before_forward(), prepend=True),
            model.register_forward_hook(lambda module, args, output: self.after_forward(output)),
        ]

    def close(self) -> None:
        """Nothing of the engine runs any more with the model or its optimizer."""
        self._drop_plans()
        self._watch.close()
        for hook in self._hooks:
            hook.remove()
        if self._model is not None:
            del self._model.__deepcopy__, self._model.__reduce_ex__
            self._model = None

    @torch.compiler.disable
    def before_forward(self) -> None:
        """Begin a micro-batch; the first one of a step plans all layers."""
        if self.passes.recomputing:
            self._dense.enter()
            return
        self._unchanged.check()
        self.passes.recover()
        if self._watch.stepped_in_backward():
            self.end_step()
        # Inside one autocast region, a second pass would reuse casts of weights that FSDP2 has freed since: its
        # gradients of them are lost.
        torch.clear_autocast_cache()
        if torch.is_grad_enabled():
            self.passes.watch_pools()
        # Python frees the graph of a dropped pass at other moments on other ranks: start from one state on all.
        self._dense.leave_evaluation()
        self._dense.enter()
        if self._placements is None:
            self._placements = self._begin_step()
        self.passes.begin_forward(self.step, self._placements, torch.is_grad_enabled())

    @torch.compiler.disable
    def after_forward(self, output: object) -> None:
        """End a forward pass; its backward, if there will be one, begins at any tensor of `output`."""
        if not self.passes.recomputing:
            self.passes.end_forward([t for t in _tensors(output) if t.requires_grad])

    def _begin_step(self) -> list[Placement]:
        with label("reshard"):
            self._resharder.before_step(self.step)
        if self._shared is not None:
            self._shared.reserve(max(layer.experts.buffer_bytes for layer in self.layers))
        with label("plan"):
            placements = self._ahead.placements()
        if self.comms.tokens is not None:
            check_placements(f"step {self.step}", tuple(placements), self.comms.tokens)
        return placements

    # The end of a step.

    def end_step(self) -> None:
        """Called after the optimizer's step: loads become history, the next forward pass plans anew."""
        if self._placements is None:
            return
        self._drop_plans()
        self._totals = [layer.end_step() for layer in self.layers]
        counts = [total.counts.sum(axis=0) for total in self._totals]
        self._loads = SummedLoads(counts, self.comms.replicas, self._device)
        self._exposed = self.comms.exposed.take()
        self.step += 1

    def skip_step(self) -> None:
        """Forget the step under way, also if a pass of it raised: the next one begins as this one did."""
        self.passes.abandon_backward()
        self._drop_plans()
        for layer in self.layers:
            layer.drop_step()
        self.comms.exposed.take()

    def restart(self, step: int) -> None:
        """Go to `step` with other weights or owners: nothing of the present step is kept."""
        self._drop_plans()
        self.step = step

    def resume(
        self, step: int, plans: Mapping[str, Mapping[str, NDArray[np.int64]]] | None, cost: CostModel | None
    ) -> None:
        """Go to `step` of another run, before its weights come: owners and load history change, gradients are dropped.

        Args:
            step: optimizer steps made.
            plans: layer -> `LayerPlans.state()` and "owners"; None: no history.
            cost: of that run, if its mesh was equal: owners are then its own if the pools have room, else the initial
                ones, and plans are made as it would have made them.
        """
        self.restart(step)
        for pool in dict.fromkeys(layer.experts.pool for layer in self.layers):
            pool.set_owners(pool.initial_owners())
            if plans is not None and cost is not None:
                owners = [plans[spec.name]["owners"] for spec in pool.specs]
                pool.set_owners(owners if pool.fits(owners) else pool.owners)
        for layer in self.layers:
            layer.restart(None if plans is None else plans[layer.name], cost)
        for parameter in () if self._model is None else self._model.parameters():
            parameter.grad = None

    def _drop_plans(self) -> None:
        """Nothing gathered or planned outlives its step: the weights change."""
        self.passes.end_step()
        if self._shared is not None:
            self._shared.evict()
        self._placements = None

    def report(self) -> list[dict[str, Any]]:
        """The last step, or the first one as far as it has come, an entry per layer, as `FSSDP.stats()` gives it."""
        totals = self._totals or [layer.totals for layer in self.layers]
        exposed = self._exposed if self._totals else self.comms.exposed
        loads = self.loads() or [total.counts.sum(axis=0) for total in totals]
        return [
            layer.report(total) | {"loads": loads[i], "exposed_seconds": exposed.seconds(i)}
            for i, (layer, total) in enumerate(zip(self.layers, totals, strict=True))
        ]

    def loads(self) -> list[NDArray[np.int64]]:
        """Per layer, int64 `[E]`: tokens of the last step per expert, of all ranks and replicas; empty before it."""
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
