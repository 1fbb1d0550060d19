"""The copies of one layer for one micro-batch: how they are gathered and held, and how their gradients are reduced.

If compute and master dtype are equal, owned rows are read in place and the buffer holds only copies. Otherwise the
buffer has one row per expert held, including the owned ones (docs/design.md, decision 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from hecate.collectives.moves import Moves, moves_between
from hecate.collectives.summation import accumulation_dtype
from hecate.experts import Dtypes
from hecate.placement import Placement
from hecate.runtime.comms import Comms, Pending
from hecate.runtime.experts.buffers import CopiesMemory, SharedBuffers
from hecate.runtime.experts.layout import ChunkLayout
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.experts.reduction import Reduction, nothing, runs

__all__ = ["CopyState", "LayerCopies", "LayerExperts"]


class CopyState(Enum):
    """State of the copies of one layer.

    SHARDED: there are none; only owners hold experts.
    GATHERING: transfers are writing the copies into a buffer, which must not be read yet.
    HELD: the copies are in the buffer and may be read.
    """

    SHARDED = "sharded"
    GATHERING = "gathering"
    HELD = "held"


@dataclass
class LayerExperts:
    """The experts of one layer: what is common to its copies in all micro-batches.

    Attributes:
        index: index of the layer in the model.
        name: name of the layer's experts module in the model.
        pool, place: the pool that owns the experts, and the position of this layer in it.
        dtypes: dtypes of the layer's experts.
        comms: process groups, transport and lanes.
        memory_slots: most copies that a device may hold of this layer.
        shared: the buffers of re-materialization; None: each micro-batch allocates its own buffer.
        memory: counts the bytes of buffers that are not shared.
        layout: how the weights of one copy lie in its row of the buffer.
        bytes_sent: bytes sent over all links together since the last step.
    """

    index: int
    name: str
    pool: ExpertPool
    place: int
    dtypes: Dtypes
    comms: Comms
    memory_slots: int
    shared: SharedBuffers | None
    memory: CopiesMemory
    layout: ChunkLayout = field(init=False)
    bytes_sent: int = 0

    def __post_init__(self) -> None:
        self.layout = ChunkLayout(self.pool.weights)

    def gradient_layout(self, kinds: Iterable[str] | None = None) -> ChunkLayout:
        """Layout of a chunk with gradients of `kinds`; None: of the kinds that are trained now."""
        wanted = {kind for kind, _ in self.pool.trainable()} if kinds is None else set(kinds)
        return ChunkLayout([w for w in self.pool.weights if w.kind in wanted])

    def make_routes(self, owners: Placement, placement: Placement, gather: bool = True) -> None:
        """Find the routes between `owners` and `placement` and keep them. Sends nothing; any thread may call it.

        Args:
            owners: the owner of each expert.
            placement: the holders of each expert.
            gather: whether the copies are still to be gathered; the route of their gradients is always made.
        """
        moves, comms = moves_between(owners, placement), self.comms
        if comms.experts is None or comms.reductions is None or not moves.transfers:
            return
        if gather:
            comms.experts.prepare_gather(moves, self.layout.numel * self.dtypes.param.itemsize)
        if gradient := self.gradient_layout().numel:
            comms.reductions.prepare_reduce(moves.reversed, gradient, self.dtypes.reduce)

    @property
    def casts(self) -> bool:
        """Whether experts compute in another dtype than the owned weights have."""
        return self.dtypes.param != self.dtypes.master

    @property
    def buffer_rows(self) -> int:
        """Rows of a buffer: one per copy of an expert owned elsewhere, and one per owned expert if weights are cast."""
        owned = len(self.owned)
        copies = min(self.memory_slots, self.owners.num_experts - owned)
        return copies + (owned if self.casts else 0)

    @property
    def buffer_bytes(self) -> int:
        """Size of a buffer in bytes."""
        return self.buffer_rows * self.layout.numel * self.dtypes.param.itemsize

    @property
    def owners(self) -> Placement:
        """The owner of each expert, as a placement."""
        return self.pool.placement(self.place)

    @property
    def owned(self) -> list[int]:
        """Ascending ids of this device's experts."""
        return self.pool.owned(self.place).tolist()


class LayerCopies:
    """The experts that this device computes in one layer and micro-batch: owned rows first, then copies.

    Attributes:
        layer: the experts of the layer.
        placement: which devices hold which experts.
        state: see `CopyState`.
        settled: whether something was computed with them; from then on the placement stays.
        unfinished: calls of the layer whose backward has not run.
    """

    def __init__(self, layer: LayerExperts, placement: Placement) -> None:
        self.layer = layer
        self.placement = placement
        self.state = CopyState.SHARDED
        self.settled = False
        self.unfinished = 0
        self._owned = layer.owned
        self._copies = self._new_experts(layer.owners, placement)
        self._buffer: Tensor | None = None
        self._pending: list[Pending] = []
        self._reduction: Reduction | None = None  # whose own gradients may still have to be added

    @property
    def experts(self) -> list[int]:
        """Experts held here in the order of their rows: owned ones by ascending id, then copies as they were added."""
        return self._owned + self._copies

    def launch(self) -> None:
        """Go from SHARDED to GATHERING: start to gather the copies; in other states do nothing. Collective."""
        if self.state is not CopyState.SHARDED:
            return
        self._allocate()
        self._start(moves_between(self.layer.owners, self.placement))

    def extend(self, placement: Placement) -> None:
        """Also gather what `placement` has beyond the present one. In state GATHERING and not settled. Collective."""
        self._require(CopyState.GATHERING)
        owners, old = self.layer.owners, self.placement
        self._copies = self._copies + self._new_experts(old, placement)
        self.placement = placement
        self._start(moves_between(owners, owners | (placement - old)))

    def ensure_held(self) -> None:
        """Go to state HELD: wait for the copies, or gather them now if they were released."""
        self.launch()
        for pending in self._pending:
            pending.wait()
        self._pending = []
        self.state, self.settled = CopyState.HELD, True

    def release(self) -> None:
        """Go back to SHARDED, after all transfers have ended."""
        for pending in self._pending:
            pending.wait()
        if self._buffer is not None and self.layer.shared is None:
            self.layer.memory.add(-self._buffer.nbytes)
        self._pending, self._buffer, self.state = [], None, CopyState.SHARDED

    def parts(self) -> list[tuple[list[int], dict[str, Tensor]]]:
        """One part per stack of consecutive rows in memory: (positions in `experts`, views kind -> `[n, *shape]`).

        In state HELD. Views of the buffer have version counters of their own: for backward, the buffer is written again
        with the same values, and autograd must not take that for a change of the tensors it saved.
        """
        self._require(CopyState.HELD)
        owned = list(range(len(self._owned)))
        copies = list(range(len(owned), len(self.experts)))
        buffer = None if self._buffer is None else self._buffer.data
        if self.layer.casts:
            assert buffer is not None
            return [(owned + copies, self.layer.layout.views(buffer[: len(self.experts)]))]
        parts = [(owned, self.layer.pool.weights_of(self.layer.place))]
        if copies:
            assert buffer is not None
            parts.append((copies, self.layer.layout.views(buffer[: len(copies)])))
        return parts

    def reduce(self, grads: Mapping[str, Sequence[Tensor]], target: Mapping[str, Tensor]) -> Reduction:
        """Start to sum gradients at the owners. Collective.

        In state HELD. Gradients of experts that have copies are sent in `reduce_dtype`. Those of experts that only
        their owner holds are added by `Reduction.add_own`, so that nothing delays the launch.

        Args:
            grads: kind -> one stack of gradients `[n, *shape]` per part of `parts`.
            target: kind -> `[owned, *shape]`, where owners add them; see `ExpertPool.add_gradients`.
        """
        self._require(CopyState.HELD)
        layer, owned = self.layer, len(self._owned)
        held = self.placement.matrix[self._owned].sum(axis=1)
        alone, shared = np.flatnonzero(held == 1).tolist(), np.flatnonzero(held > 1).tolist()
        travel = shared + list(range(owned, len(self.experts)))
        layout = layer.gradient_layout(grads)
        rows = self._gradient_rows(len(travel), layout, layer.dtypes.reduce)
        if travel:
            single = {kind: [row for stack in stacks for row in stack.unbind(0)] for kind, stacks in grads.items()}
            layout.pack({kind: [each[i] for i in travel] for kind, each in single.items()}, rows)
        contributed = dict(zip([self.experts[i] for i in travel], rows.unbind(0), strict=True))
        home, add_sums = self._reduce(shared, contributed, layout, target)
        own = {kind: stacks[0][:owned] for kind, stacks in grads.items()}

        def add_own() -> None:
            for first, last in runs(alone):
                part = {kind: stack[first:last] for kind, stack in own.items()}
                layer.pool.add_gradients(first, part, layer.comms.gradient_scale, target)

        self._reduction = Reduction(home, add_own, add_sums)
        return self._reduction

    def add_own_gradients(self) -> None:
        """Add what the last `reduce` left for `Reduction.add_own`, if that was not done yet."""
        reduction, self._reduction = self._reduction, None
        if reduction is not None:
            reduction.add_own()

    def _reduce(
        self,
        shared: list[int],
        contributed: dict[int, Tensor],
        layout: ChunkLayout,
        target: Mapping[str, Tensor],
    ) -> tuple[Pending, Callable[[], None]]:
        """The transfers, and what adds their results to the owners' gradients."""
        layer, wire = self.layer, self.layer.dtypes.reduce
        transport = layer.comms.reductions
        if transport is None or not self._anything_shared:
            return Pending(nothing), nothing
        moves = moves_between(layer.owners, self.placement).reversed
        sums = self._gradient_rows(len(shared), layout, accumulation_dtype(wire))
        sums_of = dict(zip([self._owned[i] for i in shared], sums.unbind(0), strict=True))
        layer.bytes_sent += len(moves.transfers) * layout.numel * wire.itemsize
        home = layer.comms.gradients.start(layer.index, lambda: transport.reduce(moves, contributed, sums_of, wire))

        def add() -> None:
            at = 0
            for first, last in runs(shared):
                part = layout.views(sums[at : at + last - first])
                layer.pool.add_gradients(first, part, layer.comms.gradient_scale, target)
                at += last - first

        return home, add

    def _require(self, state: CopyState) -> None:
        if self.state is not state:
            raise RuntimeError(f"{self.layer.name}: its copies are {self.state.value}, must be {state.value}")

    @property
    def _anything_shared(self) -> bool:
        return bool((self.placement.matrix.sum(axis=1) > 1).any())

    def _new_experts(self, old: Placement, new: Placement) -> list[int]:
        return (new - old).held_by(self.layer.comms.rank).tolist()

    def _gradient_rows(self, rows: int, layout: ChunkLayout, dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, layout.numel, dtype=dtype, device=self.layer.pool.device)

    def _allocate(self) -> None:
        layer = self.layer
        if layer.buffer_rows == 0 and not layer.casts and layer.shared is None:
            return
        if layer.shared is not None:  # also for no rows: the tenant before must be released on all ranks alike
            memory = layer.shared.lend(self, layer.index, layer.buffer_bytes)
        else:
            memory = torch.empty(layer.buffer_bytes, dtype=torch.uint8, device=layer.pool.device)
            layer.memory.add(layer.buffer_bytes)
        self._buffer = memory.view(layer.dtypes.param).view(layer.buffer_rows, layer.layout.numel)
        if layer.casts:
            layer.layout.pack(layer.pool.weights_of(layer.place), self._buffer[: len(self._owned)])

    def _start(self, moves: Moves) -> None:
        """Launch one gather into the buffer, if any device gets a copy."""
        layer, self.state = self.layer, CopyState.GATHERING
        transport = layer.comms.experts
        if transport is None or not moves.transfers:
            return
        layer.bytes_sent += len(moves.transfers) * layer.layout.numel * layer.dtypes.param.itemsize
        sent, received = self._sent(moves), self._received(moves)
        self._pending.append(layer.comms.copies.start(layer.index, lambda: transport.gather(moves, sent, received)))

    def _sent(self, moves: Moves) -> dict[int, Tensor]:
        """Rows that this device sends, packed and cast."""
        layer, rank = self.layer, self.layer.comms.rank
        leaving = sorted({t.expert for t in moves.transfers if t.src == rank})
        position = {e: i for i, e in enumerate(self._owned)}
        if layer.casts and self._buffer is not None:
            return {e: self._buffer[position[e]] for e in leaving}
        weights = layer.pool.weights_of(layer.place)
        rows = next(iter(weights.values())).new_empty(len(leaving), layer.layout.numel)
        layer.layout.pack({k: [w[position[e]] for e in leaving] for k, w in weights.items()}, rows)
        return dict(zip(leaving, rows, strict=True))

    def _received(self, moves: Moves) -> dict[int, Tensor]:
        """Rows of the buffer that the copies are received into."""
        arriving = self._new_experts(moves.src, moves.dst)
        first = len(self._owned) if self.layer.casts else 0
        position = {e: first + i for i, e in enumerate(self._copies)}
        return {} if self._buffer is None else {e: self._buffer[position[e]] for e in arriving}
