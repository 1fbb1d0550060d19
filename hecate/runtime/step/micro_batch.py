"""One forward pass of the model and the backward pass that may follow it."""

from __future__ import annotations

import weakref
from enum import Enum

from hecate.placement import Placement
from hecate.runtime.experts.copies import LayerCopies, LayerExperts
from hecate.runtime.step.record import LayerRecord

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
        records: layer index -> what the layer did.
        launched: layer index -> copies that were launched for a layer which has not run yet.
        booked: whether the loads of this micro-batch were counted.
    """

    def __init__(self, number: int, with_grad: bool) -> None:
        self.number = number
        self.with_grad = with_grad
        self.state = PassState.FORWARD
        self.records: dict[int, LayerRecord] = {}
        self.launched: dict[int, LayerCopies] = {}
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

    def launch(self, experts: LayerExperts, placement: Placement) -> None:
        """Start to gather the copies of one layer, unless that was started before. Collective."""
        if experts.index not in self.launched:
            copies = self.launched[experts.index] = LayerCopies(experts, placement)
            copies.launch()

    def drop_launched(self) -> None:
        """Release copies of layers that the pass did not reach."""
        for copies in self.launched.values():
            copies.release()
        self.launched.clear()

    def end(self) -> None:
        """Release all copies, drop all records, and go to state ENDED."""
        self.drop_launched()
        for record in self.records.values():
            record.copies.release()
        self.records.clear()
        self.state = PassState.ENDED
