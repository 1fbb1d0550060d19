"""Gradients of experts on their way to the owners in the running backward pass, and when they are complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from hecate.labels import label
from hecate.private_torch import post_accumulate_hooks, refuse_hooks
from hecate.runtime.comms import Comms
from hecate.runtime.dense.base import Dense
from hecate.runtime.experts.copies import LayerCopies
from hecate.runtime.experts.layer import LayerExperts
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.experts.reduction import Reduction
from hecate.runtime.step.replicas import ReplicaAverages

__all__ = ["ExpertGradients"]


class ExpertGradients:
    """At most one layer's gradients are under way; the next layer's start when they have arrived.

    Args:
        layers: the experts of each MoE layer, in the order of the forward pass.
        comms: process groups and lanes.
        dense: knows whether gradients are reduced over replicas after this pass.
    """

    def __init__(self, layers: Sequence[LayerExperts], comms: Comms, dense: Dense) -> None:
        self._pools = tuple(dict.fromkeys(layer.pool for layer in layers))
        self._comms = comms
        self._dense = dense
        self._under_way: list[tuple[int, Reduction]] = []  # layer index and transfers
        several = comms.replicas is not None and comms.replicas.size() > 1
        self._averages = ReplicaAverages(layers, comms) if several else None
        self._nodes: dict[int, Node] = {}  # id of a pool's parameter -> its AccumulateGrad node

    def watch_hooks(self) -> None:
        """Complete pools' gradients before autograd runs post-accumulate hooks that users registered on them.

        Raises:
            RuntimeError: a pool's parameter has a hook from `register_hook`, which would never run.
        """
        for pool in self._pools:
            for kind, parameter in pool.trainable():
                refuse_hooks(f"expert weights {kind!r} of {pool.specs[0].name}", parameter)
                if id(parameter) not in self._nodes:
                    node = self._nodes[id(parameter)] = get_gradient_edge(parameter).node
                    node.register_prehook(lambda grads, pool=pool, parameter=parameter: self._before(pool, parameter))

    def send(self, copies: LayerCopies, grads: Mapping[str, Sequence[Tensor]]) -> None:
        """Start to add the gradients of one layer's experts to the owners'. See `LayerCopies.reduce`. Collective."""
        layer = copies.layer
        with self._comms.guard(), label("reduce", layer.name):
            self._arrive()
            fresh = None
            if self._averages is not None:
                target = self._averages.target(layer, grads, self._dense.sync)
            elif copies.take_gradients(grads):
                return
            elif (fresh := layer.pool.new_gradients(grads)) is not None:
                target = fresh
            else:
                target = layer.pool.gradients_of(layer.place, grads)
            self._under_way.append((layer.index, copies.reduce(grads, target, fresh is not None)))

    def next_pass(self) -> None:
        """The backward pass of another micro-batch begins, or there is none: complete the gradients. Collective."""
        with self._comms.guard():
            self._arrive()
            if self._averages is not None and self._dense.sync:
                self._averages.end_round()

    def discard(self) -> None:
        """The backward pass raised: let transfers end, and add nothing more."""
        for _, reduction in self._under_way:
            reduction.discard()
        self._under_way.clear()
        if self._averages is not None:
            self._averages.discard()

    def _arrive(self) -> None:
        """Return when all gradients that were sent are at their owners; their averages over replicas begin."""
        for index, reduction in self._under_way:
            reduction.finish()
            if self._averages is not None and self._dense.sync:
                self._averages.launch_down_to(index)
        self._under_way.clear()

    def _before(self, pool: ExpertPool, parameter: Tensor) -> None:
        """Runs when all layers of the pool have run backward: complete its gradients if user hooks will read them."""
        if post_accumulate_hooks(parameter):
            with self._comms.guard():
                self._arrive()
                if self._averages is not None and self._dense.sync:
                    self._averages.finish(pool)
