"""One forward pass of the model and the backward pass that may follow it."""

from __future__ import annotations

import weakref
from enum import Enum

from hecate.placement import Placement
from hecate.runtime.experts.copies import LayerCopies, LayerExperts
from hecate.runtime.step.record import LayerRecord

__all__ = ["GraphToken", "MicroBatch", "PassState"]


class PassState(Enum):
    """Where a micro-batch is.

    FORWARD: the model runs; each layer is planned, and the next layer's copies are launched behind it.
    WAITING: the forward pass is over; records and copies are kept as long as the autograd graph lives.
    BACKWARD: gradients flow; a recomputation replays the records.
    ENDED: nothing is kept. If the graph was retained, another backward pass may begin.
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
    """Held by the autograd graph of a forward pass and by nothing else: it goes when the graph goes."""

    def __init__(self, micro_batch: MicroBatch) -> None:
        self.micro_batch = micro_batch


class MicroBatch:
    """What is kept of one forward pass.

    Attributes:
        number: of the forward pass, ascending.
        with_grad: whether a backward pass may follow.
        state: see `PassState`.
        records: layer index -> what it did.
        launched: layer index -> copies that no layer has taken yet.
        booked: whether its loads were counted.
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
        """The token for the graph of this pass; whoever builds the graph must keep it until the pass is over."""
        token = GraphToken(self)
        self._token = weakref.ref(token)
        return token

    @property
    def token(self) -> GraphToken | None:
        """The token if the graph is alive."""
        return None if self._token is None else self._token()

    def advance(self, state: PassState) -> None:
        """Enter another state; RuntimeError if it cannot follow the present one."""
        if state not in NEXT[self.state]:
            raise RuntimeError(f"micro-batch {self.number}: {state.value} cannot follow {self.state.value}")
        self.state = state

    def launch(self, experts: LayerExperts, placement: Placement) -> None:
        """Start to gather the copies of one layer, unless that has begun. Collective."""
        if experts.index not in self.launched:
            copies = self.launched[experts.index] = LayerCopies(experts, placement)
            copies.launch()

    def drop_launched(self) -> None:
        """Release copies of layers that the pass did not reach."""
        for copies in self.launched.values():
            copies.release()
        self.launched.clear()

    def end(self) -> None:
        """Keep nothing."""
        self.drop_launched()
        for record in self.records.values():
            record.copies.release()
        self.records.clear()
        self.state = PassState.ENDED
