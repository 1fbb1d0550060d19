"""Gradients of experts on their way to the owners in the running backward pass, and when they are complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from hecate.labels import label
from hecate.private_torch import post_accumulate_hooks, refuse_hooks
from hecate.runtime.comms import Comms
from hecate.runtime.dense.base import Dense
from hecate.runtime.experts.copies import LayerCopies, Reduction
from hecate.runtime.experts.pool import ExpertPool

__all__ = ["ExpertGradients"]


class ExpertGradients:
    """At most one layer's gradients are under way; the next layer's start when they have arrived.

    Args:
        pools: own the experts.
        comms: process groups and lanes.
        dense: knows whether gradients are reduced over replicas after this pass.
    """

    def __init__(self, pools: Sequence[ExpertPool], comms: Comms, dense: Dense) -> None:
        self._pools = tuple(pools)
        self._comms = comms
        self._dense = dense
        self._under_way: list[Reduction] = []
        self._complete: set[int] = set()  # ids of pools whose gradients are complete in the running backward pass
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
        with self._comms.guard(), label("reduce", copies.layer.name):
            self._finish()
            self._under_way.append(copies.reduce(grads))

    def arrive(self) -> None:
        """Return when all gradients that were sent are at their owners."""
        with self._comms.guard():
            self._finish()

    def complete(self) -> None:
        """The backward pass is over: average over replicas what was not averaged yet. Collective."""
        for pool in self._pools:
            self._complete_pool(pool)
        self._complete.clear()

    def discard(self) -> None:
        """The backward pass raised: let transfers end, and add nothing more."""
        for reduction in self._under_way:
            reduction.discard()
        self._under_way.clear()
        self._complete.clear()

    def _finish(self) -> None:
        for reduction in self._under_way:
            reduction.finish()
        self._under_way.clear()

    def _before(self, pool: ExpertPool, parameter: Tensor) -> None:
        """Runs when all layers of the pool have run backward: complete its gradients if user hooks will read them."""
        if post_accumulate_hooks(parameter):
            self.arrive()
            with self._comms.guard():
                self._complete_pool(pool)

    def _complete_pool(self, pool: ExpertPool) -> None:
        if id(pool) in self._complete:
            return
        self._complete.add(id(pool))
        if self._dense.sync and self._comms.replicas is not None:
            pool.average_gradients(self._comms.replicas)
