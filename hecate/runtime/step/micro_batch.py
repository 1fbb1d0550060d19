"""One forward pass of the model and the backward pass that may follow it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType

from hecate.placement import Placement
from hecate.runtime.experts.copies import LayerCopies
from hecate.runtime.experts.layer import LayerExperts
from hecate.runtime.plans.layer import LayerPlans
from hecate.runtime.step.record import LayerRecord
from hecate.runtime.step.shared_experts import Early

__all__ = ["GraphToken", "MicroBatch", "PassState"]


class PassState(Enum):
    """State of a micro-batch.

    FORWARD: the model runs; after each layer, the gather of the next layer's copies is launched.
    WAITING: the forward pass is over; records and copies are kept as long as the autograd graph is alive.
    BACKWARD: the backward pass runs; a recomputation (activation checkpointing) replays the records.
    ENDED: no records or copies are kept. If the graph was retained, another backward pass may begin.
    """

    FORWARD = "forward"
    WAITING = "waiting"
    BACKWARD = "backward"
    ENDED = "ended"


NEXT = {
    PassState.FORWARD: (PassState.WAITING, PassState.ENDED),
    PassState.WAITING: (PassState.BACKWARD, PassState.ENDED),
    PassState.BACKWARD: (PassState.ENDED,),
    PassState.ENDED: (PassState.BACKWARD,),
}


class GraphToken:
    """Held only by the autograd graph of a forward pass, so that it is freed together with the graph."""

    def __init__(self, micro_batch: MicroBatch) -> None:
        self.micro_batch = micro_batch


class MicroBatch:
    """What is kept of one forward pass.

    Attributes:
        number: number of the forward pass, ascending.
        with_grad: whether a backward pass may follow.
        state: see `PassState`.
        early: layer index -> how its shared experts run while tokens travel, of the layers where they do; a
            recomputation does as the forward pass did.
        graph_task: `private_torch.graph_task()` of its forward pass; in any other, layers are called to recompute.
        calls: layer index -> calls of the layer in the forward pass; several if the model loops over it.
        graphed: indices of layers of which some call built a graph; others are called without gradients, or under
            reentrant activation checkpointing.
        records: (layer index, call) -> what the layer did.
        copies: layer index -> copies, launched before the layer's first call; they serve all its calls.
        booked: whether the loads of this micro-batch were counted.
    """

    def __init__(
        self, number: int, with_grad: bool, graph_task: int = -1, early: Mapping[int, Early] = MappingProxyType({})
    ) -> None:
        self.number = number
        self.with_grad = with_grad
        self.early = dict(early)
        self.graph_task = graph_task
        self.state = PassState.FORWARD
        self.calls: Counter[int] = Counter()
        self.graphed: set[int] = set()
        self.records: dict[tuple[int, int], LayerRecord] = {}
        self.copies: dict[int, LayerCopies] = {}
        self.booked = False
        self._token: weakref.ref[GraphToken] | None = None

    def new_token(self) -> GraphToken:
        """Make the token for the graph of this pass. The caller must keep it alive until the forward pass is over."""
        token = GraphToken(self)
        self._token = weakref.ref(token)
        return token

    @property
    def token(self) -> GraphToken | None:
        """The token; None if the graph has been freed."""
        return None if self._token is None else self._token()

    def advance(self, state: PassState) -> None:
        """Change to `state`; RuntimeError if it cannot follow the present state."""
        if state not in NEXT[self.state]:
            raise RuntimeError(f"micro-batch {self.number}: {state.value} cannot follow {self.state.value}")
        self.state = state

    def launch(self, experts: LayerExperts, placement: Placement) -> LayerCopies:
        """The copies of one layer, whose gather is started unless they are held or arriving. Collective."""
        if experts.index not in self.copies:
            self.copies[experts.index] = LayerCopies(experts, placement, keep_casts=self.with_grad)
        self.copies[experts.index].launch()
        return self.copies[experts.index]

    def recorded(self, layer: int) -> LayerRecord | None:
        """What a recomputation of the layer replays; None if the layer was called several times, or without a record.

        Nothing tells which of several calls is recomputed: segments of activation checkpointing come last to first, but
        may contain any number of calls, which are recomputed first to last.
        """
        return self.records.get((layer, 0)) if self.calls[layer] <= 1 else None

    def drop_unrecorded(self) -> None:
        """Release copies of layers that no backward pass will reach."""
        reached = {layer for layer, _ in self.records}
        for layer in self.copies.keys() - reached:
            self.copies.pop(layer).release()

    def book(self, plans: Sequence[LayerPlans]) -> None:
        """Count the loads of a micro-batch that is trained on: once, even if its backward runs several times."""
        if self.booked:
            return
        self.booked = True
        for (layer, _), record in self.records.items():
            plans[layer].book(*record.planned.both, record.top_k)

    def end(self) -> None:
        """Release all copies, drop all records, and go to state ENDED."""
        self.records.clear()
        self.drop_unrecorded()
        self.state = PassState.ENDED
