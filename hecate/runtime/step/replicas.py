"""Averages gradients of experts over replicas, layer by layer, while the backward pass goes on.

On a (replicate, shard) mesh a gradient that has arrived at its owner is the sum over one replica only. As soon as a
layer's sum is complete, it is all-reduced over the replicas, in `reduce_dtype`, as FSDP2 does with the dense part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from hecate.collectives.transport import Work
from hecate.labels import label
from hecate.ranks.messages import all_reduce
from hecate.runtime.comms import Comms, Pending
from hecate.runtime.experts.layer import LayerExperts
from hecate.runtime.experts.pool import ExpertPool

__all__ = ["ReplicaAverages"]

MOST_UNDER_WAY = 2
"""Layers whose all-reduce may be under way: more would only hold memory."""


@dataclass(frozen=True)
class _Average:
    """One layer's gradients on their way.

    Attributes:
        layer: the layer.
        reached: kinds of weights of which this device sends gradients; of the others it sends zeros.
        totals: kind -> `[owned, *shape]` in `reduce_dtype`: when `home` is complete, the sum over replicas.
        reached_by: `[kinds]`: when `home` is complete, how many replicas have sent gradients of each kind.
        home: the transfers.
    """

    layer: LayerExperts
    reached: frozenset[str]
    totals: Mapping[str, Tensor]
    reached_by: Tensor
    home: Pending


class ReplicaAverages:
    """Which collectives are launched does not depend on what this device's passes reach.

    The backward pass of one micro-batch is a round. In a round every layer is all-reduced once, the last layer first;
    a layer that was not reached here contributes zeros, for other replicas may have reached it. Inside `no_sync`
    nothing is launched: sums of this replica are kept in `ExpertPool.unreduced` until a round takes them along.

    Args:
        layers: the experts of each MoE layer, in the order of the forward pass.
        comms: process groups and lanes; with replicas.
    """

    def __init__(self, layers: Sequence[LayerExperts], comms: Comms) -> None:
        assert comms.replicas is not None
        self._layers = tuple(layers)
        self._replicas: dist.ProcessGroup = comms.replicas
        self._lane = comms.averages
        self._left = len(self._layers)  # the round's layers [0, left) are to be launched yet
        self._sums: dict[int, dict[str, Tensor]] = {}  # by layer: this pass's gradients, until they are launched
        self._under_way: deque[_Average] = deque()

    def target(self, layer: LayerExperts, kinds: Iterable[str], sync: bool) -> dict[str, Tensor]:
        """Rows kind -> `[owned, *shape]` in master dtype, to which this pass's gradients of a layer are to be added.

        Args:
            layer: the layer.
            kinds: the kinds of weights that get gradients.
            sync: whether this pass is averaged.
        """
        if not sync:
            rows = layer.pool.rows(layer.place)
            return {kind: layer.pool.unreduced_rows(kind)[rows] for kind in kinds}
        if layer.index >= self._left:  # reached once more by the same backward pass
            self.end_round()
        sums = self._sums.setdefault(layer.index, {})
        weights = layer.pool.weights_of(layer.place)
        for kind in kinds:
            if kind not in sums:
                sums[kind] = weights[kind].new_zeros(weights[kind].shape)
        return {kind: sums[kind] for kind in kinds}

    def launch_down_to(self, index: int) -> None:
        """Launch the all-reduce of layer `index`, whose sum is complete, after those of all later layers. Collective.

        Later layers that were not launched before were not reached.
        """
        while self._left > index:
            self._left -= 1
            while len(self._under_way) >= MOST_UNDER_WAY:
                self._finish_first()
            self._launch(self._layers[self._left])

    def finish(self, pool: ExpertPool) -> None:
        """Complete the gradients of one pool in this round. Collective."""
        self.launch_down_to(min(layer.index for layer in self._layers if layer.pool is pool))
        while self._under_way:
            self._finish_first()

    def end_round(self) -> None:
        """Launch all layers that are left, and wait for all; the next gradients begin a new round. Collective."""
        self.launch_down_to(0)
        while self._under_way:
            self._finish_first()
        for layer in self._layers:
            layer.pool.unreduced.clear()
        self._left = len(self._layers)

    def discard(self) -> None:
        """The backward pass raised, or its step is skipped: wait for transfers, and forget what was not averaged."""
        for average in self._under_way:
            average.home.wait()
        self._under_way.clear()
        self._sums.clear()
        self._left = len(self._layers)
        for layer in self._layers:
            layer.pool.unreduced.clear()

    def _launch(self, layer: LayerExperts) -> None:
        """Start the all-reduce of one layer; weights that are frozen on all ranks need none."""
        layout = layer.gradient_layout()
        kinds = [weight.kind for weight in layout.weights]
        sums = self._take(layer)
        if not kinds:
            return
        owned = layer.num_owned
        flat = self._lane.arena.empty(1, owned * layout.numel + len(kinds), layer.dtypes.reduce)[0]
        rows, reached = flat[: owned * layout.numel].view(owned, layout.numel), flat[owned * layout.numel :]
        views = layout.views(rows)
        for kind, flag in zip(kinds, reached, strict=True):
            flag.fill_(kind in sums)
            if kind in sums:
                views[kind].copy_(sums[kind])
            else:
                views[kind].zero_()
        with label("reduce", layer.name):
            home = self._lane.start(layer.index, lambda: self._all_reduce(flat))
        self._under_way.append(_Average(layer, frozenset(sums), views, reached, home))

    def _all_reduce(self, flat: Tensor) -> Work:
        return Work(all_reduce(flat, group=self._replicas, async_op=True))

    def _take(self, layer: LayerExperts) -> dict[str, Tensor]:
        """Gradients that this device has of a layer since the last round: kind -> `[owned, *shape]`."""
        sums = self._sums.pop(layer.index, {})
        rows = layer.pool.rows(layer.place)
        for kind, unreduced in layer.pool.unreduced.items():
            sums[kind] = sums[kind].add_(unreduced[rows]) if kind in sums else unreduced[rows]
        return sums

    def _finish_first(self) -> None:
        """Wait for the all-reduce that was launched first, and add its mean to the gradients of the owned experts."""
        average = self._under_way.popleft()
        average.home.wait()
        pool, rows = average.layer.pool, average.layer.pool.rows(average.layer.place)
        for (kind, total), reached in zip(average.totals.items(), average.reached_by, strict=True):
            parameter = pool.parameters[kind]
            if not parameter.requires_grad:  # frozen by a hook in this backward pass
                continue
            # Weights that no replica's pass has reached get no gradient. Only a device that has none of its own, and
            # no other gradient in this parameter, must look at what the others sent.
            if kind in average.reached or parameter.grad is not None or bool(reached):
                pool.gradient(kind)[rows].add_(total, alpha=1 / self._replicas.size())
