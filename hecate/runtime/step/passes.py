"""Keeps track of micro-batches: which one runs forward, which run backward, and what is kept in between.

Forward: when layer i is done, the gather of layer i + 1's copies is launched, so that it overlaps with the dense work
between the two layers. Backward: the reduction of layer i's gradients and, with re-materialization, the gather of layer
i - 1's copies overlap with the dense backward work between the two layers (paper, section 3.2).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hecate.labels import label
from hecate.placement import Placement
from hecate.private_torch import at_end_of_backward, graph_task, in_backward
from hecate.ranks.agree import agree
from hecate.ranks.same import debugging
from hecate.runtime.comms import Comms
from hecate.runtime.dense.base import Dense
from hecate.runtime.experts.copies import LayerCopies
from hecate.runtime.plans.ahead import PlanAhead
from hecate.runtime.plans.layer import LayerPlans
from hecate.runtime.step.gradients import ExpertGradients
from hecate.runtime.step.micro_batch import GraphToken, MicroBatch, PassState
from hecate.runtime.step.record import LayerRecord, Planned
from hecate.runtime.step.recorder import Recorder, Where
from hecate.runtime.step.shared_experts import SharedExperts
from hecate.runtime.tokens.counts import RECOMPUTED

__all__ = ["Passes"]


class Passes:
    """Runs the MoE layers of one model through forward and backward passes.

    Args:
        layers: plans of each MoE layer, in the order of the forward pass.
        comms: process groups, lanes and topology.
        dense: the dense part of the model.
        ahead: plans the next step while a backward pass runs.
        rematerialize: whether copies are released after forward and gathered again for backward.
        gemm: what multiplies rows with experts' weights; see `FSSDPConfig.expert_gemm`.
        shared_experts: of the layers that have any.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlans],
        comms: Comms,
        dense: Dense,
        ahead: PlanAhead,
        rematerialize: bool,
        gemm: str,
        shared_experts: SharedExperts,
    ) -> None:
        self.gemm = gemm
        self._shared_experts = shared_experts
        self._layers = tuple(layers)
        self._recorder = Recorder(layers, comms)
        self._comms = comms
        self._dense = dense
        self._ahead = ahead
        self._rematerialize = rematerialize
        self._step = 0
        self._placements: Sequence[Placement] = ()
        self._number = 0
        self._runs = False  # whether a forward pass is under way
        self._current: MicroBatch | None = None  # of the latest forward pass
        self._token: GraphToken | None = None  # of that pass while it runs
        self._kept: dict[int, MicroBatch] = {}  # by number: micro-batches whose records are kept
        self._graphs_gone: deque[int] = deque()  # numbers of micro-batches whose graph Python has freed
        self._in_backward: dict[int, MicroBatch] = {}  # by number: micro-batches of the running backward pass
        self._backward_of: MicroBatch | None = None  # the micro-batch whose backward runs now
        self._looped: set[int] = set()  # layers that were called several times in one forward pass
        self._unchecked: list[Planned] = []  # what no backward pass has asked for yet
        self._cast_watches = tuple(dict.fromkeys(layer.experts.watch for layer in layers))
        self.gradients = ExpertGradients([layer.experts for layer in layers], comms, dense)

    # The forward pass.

    @property
    def recomputing(self) -> bool:
        """Whether a forward pass that begins now is a recomputation during backward (activation checkpointing)."""
        if not in_backward():
            return False
        waits = self._current is not None and self._current.state is PassState.WAITING
        # Under an outer reentrant checkpoint the first forward pass ran without gradients. The one that begins now is
        # then not a recomputation: it builds the graph.
        return bool(self._in_backward) or waits

    def begin_forward(
        self, step: int, placements: Sequence[Placement], with_grad: bool, accumulates: bool = False
    ) -> None:
        """Begin a micro-batch and launch the gather of the first layer's copies. Collective.

        Args:
            step: optimizer steps so far.
            placements: per layer, the placement to gather before it runs.
            with_grad: whether a backward pass may follow.
            accumulates: whether its gradients may be added to those of earlier passes of the step, so that weights may
                not have changed since; see `CastWatch`.
        """
        self._release_freed()
        self._leave_forward()
        self._check_counts()
        for watch in self._cast_watches:
            watch.begin_forward(accumulates)
        if debugging():
            agree(self._check_casts)
        self._step, self._placements = step, placements
        self._number += 1
        self._runs = True
        self._shared_experts.forget()
        early = self._shared_experts.early() if with_grad else {}
        self._current = MicroBatch(self._number, with_grad, graph_task(), early)
        if with_grad:
            self._kept[self._number] = self._current
            self._token = self._current.new_token()
            weakref.finalize(self._token, self._graph_gone, self._number).atexit = False
        self._launch(0)

    def end_forward(self, outputs: Sequence[Tensor]) -> None:
        """End the forward pass.

        Args:
            outputs: its output tensors that require gradients; backward may begin at any of them.
        """
        micro_batch, token = self._current, self._token
        assert micro_batch is not None
        self._runs = False
        if token is not None:
            for tensor in outputs:
                tensor.register_hook(lambda grad: self.begin_backward(token))
        if not outputs and not micro_batch.with_grad:
            self._dense.leave_evaluation()
        elif outputs:
            self._dense.leave()
        # With gradients but without such outputs, no hook announces backward, and a recomputation needs the weights
        # that `enter` put in place. So the dense part stays as it is.
        self._leave_forward()

    def _check_casts(self) -> None:
        """For HECATE_DEBUG=1: RuntimeError if weights were written in a way that `CastWatch` does not see."""
        for layer in self._layers:
            if (reason := layer.experts.outdated()) is not None:
                raise RuntimeError(reason)

    def _check_counts(self) -> None:
        """Raise what is wrong with counts for which no layer waited and that no backward pass has asked for.

        After a backward pass there is nothing left to wait for.
        """
        unchecked, self._unchecked = self._unchecked, []
        for planned in unchecked:
            _ = planned.both

    def _leave_forward(self) -> None:
        """Leave state FORWARD, including after a pass that raised."""
        self._token = None
        if self._current is not None and self._current.state is PassState.FORWARD:
            self._current.drop_unrecorded()
            self._current.advance(PassState.WAITING if self._current.with_grad else PassState.ENDED)

    def _graph_gone(self, number: int) -> None:
        """Finalizer of a graph's token; Python may run it at any moment, also inside other code.

        If no backward pass can follow any more, bring the dense part back between passes. Copies are released only when
        the next pass begins, because that must happen in the same order on all ranks.
        """
        self._graphs_gone.append(number)
        if number in self._kept and not self._runs and not in_backward() and self._kept.keys() <= {*self._graphs_gone}:
            self._dense.leave_evaluation()

    def _release_freed(self) -> None:
        """End micro-batches whose graph has been freed: no backward pass can reach them."""
        while self._graphs_gone:
            micro_batch = self._kept.pop(self._graphs_gone.popleft(), None)
            if micro_batch is not None:
                micro_batch.end()

    def _launch(self, layer: int) -> None:
        """Start to gather the copies of `layer` for the running pass, if there is such a layer."""
        if layer < len(self._layers) and self._current is not None:
            experts = self._layers[layer].experts
            with label("gather", experts.name):
                self._current.launch(experts, self._placements[layer])

    # One layer.

    def record(self, layer: int, index: Tensor, weights: Tensor) -> LayerRecord:
        """Plan the layer for these tokens, or replay its plan in a recomputation. Collective if it plans.

        Args:
            layer: index of the layer.
            index: `[T, k]` experts of this device's tokens; -1: none.
            weights: `[T, k]` router weights.
        """
        micro_batch = self._running()
        name = self._layers[layer].name
        if micro_batch is None or not self._placements or not (self._runs or in_backward()):
            raise RuntimeError(
                f"{name}: called outside a forward pass of the model that fully_shard was called with; call that "
                "model instead"
            )
        call = RECOMPUTED
        if graph_task() == micro_batch.graph_task:
            call = micro_batch.calls[layer]
            micro_batch.calls[layer] += 1
            if torch.is_grad_enabled():
                micro_batch.graphed.add(layer)
        elif (recorded := micro_batch.recorded(layer)) is not None:
            return recorded
        elif micro_batch.calls[layer] > 1 and layer not in micro_batch.graphed and not self._dense.keeps_weights:
            raise RuntimeError(
                f"{name}: called {micro_batch.calls[layer]} times in one forward pass under activation checkpointing "
                "with use_reentrant=True, of which FSDP2 loses gradients; set use_reentrant=False or dense='replicate'"
            )
        where = Where(self._step, layer, call)
        record = self._recorder.record(micro_batch, where, self._placements[layer], index, weights)
        self._keep(micro_batch, layer, call, record)
        return record

    def _keep(self, micro_batch: MicroBatch, layer: int, call: int, record: LayerRecord) -> None:
        """Remember a record for recomputation and backward, and how many calls will run backward."""
        self._unchecked.append(record.planned)
        if call > 0:
            self._looped.add(layer)
        if call != RECOMPUTED:
            record.copies.unfinished += 1
        replayable = call != RECOMPUTED or micro_batch.calls[layer] <= 1
        if replayable and micro_batch.with_grad and micro_batch.state is not PassState.ENDED:
            micro_batch.records[layer, max(call, 0)] = record

    def _running(self) -> MicroBatch | None:
        """The micro-batch that a layer called now belongs to."""
        return self._backward_of if self._in_backward and in_backward() else self._current

    def token(self) -> GraphToken | None:
        """The token that the autograd graph of the running pass must hold, so that the graph's end is noticed."""
        micro_batch = self._running()
        return None if micro_batch is None else micro_batch.token

    def beside_tokens(self, layer: int, hidden: Tensor) -> Callable[[], None] | None:
        """What to compute while the tokens of `layer` travel, whose experts get `hidden`; None: nothing."""
        micro_batch = self._running()
        if micro_batch is None:
            return None
        again = graph_task() != micro_batch.graph_task
        return self._shared_experts.beside_tokens(layer, micro_batch.early, hidden, again)

    def after_layer(self, layer: int, record: LayerRecord) -> None:
        """Called when `layer` has run forward: prefetch the next layer's copies; without gradients, release its own."""
        current = self._current
        if current is not None and not current.with_grad and layer not in self._looped:
            record.copies.release()
        if not in_backward() or (current is not None and current.state is PassState.FORWARD):
            self._launch(layer + 1)
            if current is not None and current.with_grad and record.copies.placement != self._placements[layer]:
                # Copies were added after the gate. The routes of their gradients are not needed before backward.
                self._ahead.make_routes(record.copies.layer, record.copies.placement)

    # Backward.

    def begin_backward(self, token: GraphToken) -> None:
        """Begin the backward pass of a micro-batch, unless it has begun already.

        Raises:
            RuntimeError: under create_graph=True, if weights that the second backward pass reads will be gone by then.
        """
        micro_batch = token.micro_batch
        if micro_batch.number not in self._in_backward and torch.is_grad_enabled():
            self._check_create_graph()
        self._backward_of = micro_batch
        if micro_batch.number in self._in_backward:
            return
        own = {record.planned for record in micro_batch.records.values()}
        self._unchecked = [planned for planned in self._unchecked if planned not in own]
        micro_batch.book(self._layers)
        if not self._in_backward:
            self._dense.enter()
            self._dense.await_gradients()
            self._ahead.start()
            at_end_of_backward(self._finish_backward)
        else:
            self.gradients.next_pass()
        if micro_batch.state is PassState.FORWARD:  # backward() of a hidden state, called inside the forward pass
            micro_batch.advance(PassState.WAITING)
        micro_batch.advance(PassState.BACKWARD)
        self._in_backward[micro_batch.number] = micro_batch
        self._launch_again(len(self._layers) - 1)

    def _check_create_graph(self) -> None:
        """Raise RuntimeError if a second backward pass would read weights that are gone.

        No hook runs early enough in a second backward pass to bring weights back.
        """
        reason = None
        if self._rematerialize:
            reason = "rematerialize=True writes other layers' experts over those"
        elif not self._dense.keeps_weights:
            reason = "dense='fsdp' frees those"
        if reason is not None:
            raise RuntimeError(
                f"create_graph=True: {reason} that the second backward pass reads; set rematerialize=False and "
                "dense='replicate', or leave create_graph out"
            )

    def before_expert_gradients(self, copies: LayerCopies, token: GraphToken | None) -> None:
        """Called before a layer's experts run backward: wait for their weights. Collective."""
        # Usually the output hook began the backward pass; if it found no tensor in the output, it begins here.
        if token is not None:
            self.begin_backward(token)
        with self._comms.guard():
            copies.ensure_held()

    def after_expert_gradients(self, copies: LayerCopies, grads: Mapping[str, Sequence[Tensor]]) -> None:
        """Called after a layer's experts ran backward: reduce their gradients, prefetch the layer that comes next."""
        self.gradients.send(copies, grads)
        copies.unfinished -= 1
        if not self._rematerialize and copies.unfinished <= 0:
            copies.release()
        self._launch_again(copies.layer.index - 1)

    def _launch_again(self, layer: int) -> None:
        """With re-materialization, start to gather the copies of `layer` for its backward."""
        if not self._rematerialize or self._backward_of is None:
            return
        copies = self._backward_of.copies.get(layer)
        if copies is not None:
            with label("gather", copies.layer.name):
                copies.launch()

    def _finish_backward(self) -> None:
        self.gradients.next_pass()
        self._end_backward()
        for watch in self._cast_watches:
            watch.end_backward()
        self._dense.leave()
        self._dense.reduce()

    def _end_backward(self) -> None:
        self._shared_experts.forget()
        for number, micro_batch in self._in_backward.items():
            self._kept.pop(number, None)
            micro_batch.end()
        self._in_backward.clear()
        self._backward_of = None

    # The end of a step, and failures.

    def abandon_backward(self) -> None:
        """Drop all that a backward pass which raised has left, so that none of it reaches the next pass's gradients."""
        self.gradients.discard()
        self._end_backward()
        self._dense.leave()
        self._dense.drop()

    def recover(self) -> None:
        """Before a forward pass: if the last backward pass raised, abandon it."""
        if self._in_backward:
            self.abandon_backward()

    def end_step(self) -> None:
        """Drop all copies and plans: the weights have changed."""
        self._leave_forward()
        for micro_batch in self._kept.values():
            micro_batch.end()
        self._kept.clear()
        for layer in self._layers:
            layer.experts.end_step()
        for watch in self._cast_watches:
            watch.forget()
        self._placements = ()
