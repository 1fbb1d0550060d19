"""One training step under FSSDP: when to plan, gather, reduce and move, in one order on all ranks.

Forward: copies of layer i + 1 are launched when layer i is done, so that they travel behind the dense work between
them. Backward: gradients of layer i, and under re-materialization the copies of layer i - 1, travel behind the dense
backward between them (paper, section 3.2). Plans change between steps only; a step ends with the optimizer's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hecate.collectives.agreement import check_placements
from hecate.placement import Placement
from hecate.runtime.ahead import PlanAhead
from hecate.runtime.autograd_seam import at_end_of_backward, in_backward
from hecate.runtime.copies import Comms, LayerCopies, Reduction, SharedBuffers
from hecate.runtime.dispatch import dispatch_of
from hecate.runtime.exchange import Pass, count_tokens
from hecate.runtime.layer import LayerRecord
from hecate.runtime.overlap import ExposedTime
from hecate.runtime.planner import LayerPlanner
from hecate.runtime.stats import LayerTotals

__all__ = ["Engine"]


class Engine:
    """Runs all MoE layers of one model on this device.

    Args:
        layers: in the order of the forward pass.
        comms: process groups, lanes and topology.
        shared: the buffers of re-materialization, or None.
        anchor: zero-dimensional tensor that requires a gradient if any expert does.
        before_step: called at the first forward of a step, before planning (re-sharding).
        enter, leave: called around each forward and backward pass (dense replicas).
        end_of_backward: called when all expert gradients of a backward pass are home (dense reduction).
        abandon: called when a pass has raised or its step is skipped, before the next pass (drop dense gradients).
    """

    def __init__(
        self,
        layers: Sequence[LayerPlanner],
        comms: Comms,
        shared: SharedBuffers | None,
        anchor: Tensor,
        before_step: Callable[[], None],
        enter: Callable[[], None],
        leave: Callable[[], None],
        end_of_backward: Callable[[], None],
        abandon: Callable[[], None],
    ) -> None:
        self.layers = tuple(layers)
        self.comms = comms
        self.anchor = anchor
        self.step = 0
        self._totals: list[LayerTotals] = []  # of the last step
        self._exposed = ExposedTime()
        self._ahead = PlanAhead(layers, comms.topology.devices_per_node)
        self._shared = shared
        self._before_step = before_step
        self._enter, self._leave = enter, leave
        self._end_of_backward, self._abandon = end_of_backward, abandon
        self._records: dict[tuple[int, int], LayerRecord] = {}
        self._launched: dict[int, LayerCopies] = {}
        self._reductions: list[Reduction] = []
        self._placements: list[Placement] | None = None
        self._micro_batch = 0  # of the latest forward pass
        self._recording = False  # that pass may be followed by its backward
        self._backward_of = 0  # micro-batch whose backward runs now
        self._in_backward: set[int] = set()  # micro-batches of the running backward pass

    # The model's forward pass.

    def attach(self, model: nn.Module) -> None:
        """Run with every forward pass of `model`."""
        model.register_forward_pre_hook(lambda module, args: self.before_forward())
        model.register_forward_hook(lambda module, args, output: self.after_forward(output))

    @torch.compiler.disable
    def before_forward(self) -> None:
        """Begin a micro-batch; the first one of a step plans all layers."""
        if in_backward():
            self._enter()
            return
        if self._in_backward:
            self._abandon_backward()
        # Inside one autocast region, a second pass would reuse casts of weights that FSDP2 has freed since: its
        # gradients of them are lost.
        torch.clear_autocast_cache()
        self._enter()
        if self._placements is None:
            self._begin_step()
        self._micro_batch += 1
        self._recording = torch.is_grad_enabled()
        self._drop_launched()
        self._launch(0)

    @torch.compiler.disable
    def after_forward(self, output: object) -> None:
        """End a forward pass; its backward, if there will be one, begins at any tensor of `output`."""
        if in_backward():
            return
        micro_batch = self._micro_batch
        tensors = [t for t in _tensors(output) if t.requires_grad]
        for tensor in tensors:
            tensor.register_hook(lambda grad: self._begin_backward(micro_batch))
        if tensors or not self._recording:
            self._leave()
        # Otherwise nothing tells when backward begins, and a recomputation needs what `enter` put in place.

    def _begin_step(self) -> None:
        self._before_step()
        if self._shared is not None:
            self._shared.reserve(max(layer.storage.buffer_bytes for layer in self.layers), self.anchor.device)
        self._placements = self._ahead.placements()
        if self.comms.tokens is not None:
            check_placements(f"step {self.step}", tuple(self._placements), self.comms.tokens)

    # One layer.

    def compute_dtype(self, layer: int) -> torch.dtype:
        """The dtype that the experts of `layer` compute in."""
        return self.layers[layer].storage.dtypes.param

    def record(self, layer: int, index: Tensor, weights: Tensor) -> LayerRecord:
        """Plan the layer for these tokens, or replay its plan in a recomputation. Collective if it plans.

        Args:
            layer: its index.
            index: `[T, k]` experts of this device's tokens.
            weights: `[T, k]`.
        """
        key = (layer, self._backward_of if self._in_backward and in_backward() else self._micro_batch)
        if key in self._records:
            if in_backward():
                return self._records[key]
            raise RuntimeError(f"{self.layers[layer].name}: called twice in one forward pass; it must be called once")
        if self._placements is None or key[1] == 0:
            raise RuntimeError(
                f"{self.layers[layer].name}: called outside a forward pass of the model that fully_shard was called "
                "with; call that model instead"
            )
        record = self._plan(layer, index, weights)
        if self._recording:
            self._records[key] = record
            self.layers[layer].book(record.counts, record.plan, index.shape[1])
        return record

    def _plan(self, layer: int, index: Tensor, weights: Tensor) -> LayerRecord:
        planner = self.layers[layer]
        self._launch(layer)
        where = Pass(planner.name, layer, self.step, self._recording)
        counts = count_tokens(where, index, weights, planner.num_experts, self.comms)
        copies = self._launched.pop(layer)
        plan = planner.plan(counts, copies.placement, index.shape[1])
        if plan.placement != copies.placement:
            copies.extend(plan.placement)
        wire = planner.storage.dtypes.wire
        dispatch = dispatch_of(plan, index, self.comms, copies.experts, planner.cost, wire)
        return LayerRecord(counts, plan, dispatch, copies)

    def _launch(self, layer: int) -> None:
        """Start to gather the copies of `layer` for the running forward pass, if there is such a layer."""
        if layer >= len(self.layers) or layer in self._launched or self._placements is None:
            return
        copies = self._launched[layer] = LayerCopies(
            self.layers[layer].storage, self._placements[layer], self._micro_batch
        )
        copies.launch()

    def after_layer(self, layer: int, record: LayerRecord) -> None:
        """`layer` has run forward: prefetch the next layer's copies, free what nothing reads."""
        if not self._recording:
            record.copies.release()
        if not in_backward():
            self._launch(layer + 1)

    # Backward.

    def before_expert_gradients(self, copies: LayerCopies) -> None:
        """The experts of a layer are about to run backward: their weights must be here."""
        # An output that `_tensors` cannot look into has not begun the backward pass.
        self._begin_backward(copies.micro_batch)
        with self.comms.guard():
            copies.ensure_held()

    def after_expert_gradients(self, copies: LayerCopies, grads: Mapping[str, Sequence[Tensor]]) -> None:
        """The experts of a layer have run backward: send gradients home, prefetch the layer that comes next."""
        with self.comms.guard():
            self._finish_reductions()
            self._reductions.append(copies.reduce(grads))
        if self._shared is None:
            copies.release()
        self._launch_again(copies.layer.index - 1)

    def _launch_again(self, layer: int) -> None:
        record = self._records.get((layer, self._backward_of))
        if self._shared is not None and record is not None:
            record.copies.launch()

    def _begin_backward(self, micro_batch: int) -> None:
        self._backward_of = micro_batch
        if micro_batch in self._in_backward:
            return
        if not self._in_backward:
            self._enter()
            self._ahead.start()
            at_end_of_backward(self._finish_backward)
        self._in_backward.add(micro_batch)
        self._launch_again(len(self.layers) - 1)

    def _finish_backward(self) -> None:
        with self.comms.guard():
            self._finish_reductions()
        for micro_batch in self._in_backward:
            self._drop(micro_batch)
        self._in_backward.clear()
        self._leave()
        self._end_of_backward()

    def _finish_reductions(self) -> None:
        for reduction in self._reductions:
            reduction.finish()
        self._reductions.clear()

    def _abandon_backward(self) -> None:
        """Nothing of a backward pass that raised before its end may reach the next one's gradients."""
        for reduction in self._reductions:
            reduction.discard()
        self._reductions.clear()
        for micro_batch in self._in_backward:
            self._drop(micro_batch)
        self._in_backward.clear()
        self._leave()
        self._abandon()

    def _drop(self, micro_batch: int) -> None:
        for key in [k for k in self._records if k[1] == micro_batch]:
            self._records.pop(key).copies.release()

    def _drop_launched(self) -> None:
        """Copies of layers that the last forward pass did not reach."""
        for copies in self._launched.values():
            copies.release()
        self._launched.clear()

    def _drop_step(self) -> None:
        """Nothing gathered or planned outlives its step: the weights change."""
        self._drop_launched()
        for record in self._records.values():
            record.copies.release()
        self._records.clear()
        if self._shared is not None:
            self._shared.evict()
        self._placements = None

    # The end of a step.

    def end_step(self) -> None:
        """Called after the optimizer's step: loads become history, the next forward pass plans anew."""
        if self._placements is None:
            return
        self._drop_step()
        self._totals = [layer.end_step() for layer in self.layers]
        self._exposed = self.comms.exposed.take()
        self.step += 1

    def skip_step(self) -> None:
        """Forget the step under way, also where a pass of it raised: the next one begins as this one did."""
        self._abandon_backward()
        self._drop_step()
        for layer in self.layers:
            layer.drop_step()
        self.comms.exposed.take()

    def report(self) -> list[dict[str, Any]]:
        """The last step, or the first one as far as it has come, an entry a layer, as `FSSDP.stats()` gives it."""
        totals = self._totals or [layer.totals for layer in self.layers]
        exposed = self._exposed if self._totals else self.comms.exposed
        return [
            total.report(layer.name) | {"exposed_seconds": exposed.seconds(i)}
            for i, (layer, total) in enumerate(zip(self.layers, totals, strict=True))
        ]

    def restart(self, step: int) -> None:
        """Go to `step` with other weights or owners: nothing of the present step is kept."""
        self._drop_step()
        self.step = step


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
