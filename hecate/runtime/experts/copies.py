"""The copies of one layer for one micro-batch: how they are gathered and held, and how their gradients are reduced.

If compute and master dtype are equal, owned rows are read in place, and copies have a stack of their own. Otherwise
owned rows, cast, and copies after them are one stack (docs/design.md, decision 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
from torch import Tensor
from torch.autograd.graph import increment_version

from hecate.collectives.moves import Moves, moves_between
from hecate.collectives.summation import accumulation_dtype
from hecate.collectives.transport import Into
from hecate.ops.kernels.stack import KindRows
from hecate.placement import Placement
from hecate.runtime.comms import Pending
from hecate.runtime.experts.layer import LayerExperts
from hecate.runtime.experts.layout import ChunkLayout
from hecate.runtime.experts.reduction import Reduction, nothing, runs

__all__ = ["CopyState", "LayerCopies"]


class CopyState(Enum):
    """State of the copies of one layer.

    SHARDED: there are none; only owners hold experts.
    GATHERING: transfers are writing the copies into a buffer, which must not be read yet.
    HELD: the copies are in the buffer and may be read.
    """

    SHARDED = "sharded"
    GATHERING = "gathering"
    HELD = "held"


@dataclass(frozen=True)
class _Stack:
    """Experts in consecutive rows of memory: `rows` `[at least as many, numel]`."""

    experts: list[int]
    rows: Tensor


class LayerCopies:
    """The experts that this device computes in one layer and micro-batch: owned rows, kept copies, then other copies.

    Attributes:
        layer: the experts of the layer.
        placement: which devices hold which experts.
        state: see `CopyState`.
        settled: whether something was computed with them; from then on the placement stays.
        unfinished: calls of the layer whose backward has not run.
    """

    def __init__(self, layer: LayerExperts, placement: Placement, keep_casts: bool = False) -> None:
        self.layer = layer
        self.placement = placement
        self.state = CopyState.SHARDED
        self.settled = False
        self.unfinished = 0
        self._owned = layer.owned
        copies = self._new_experts(layer.owners, placement)
        kept = () if layer.kept is None else layer.kept.held(layer.place)
        self._kept = [expert for expert in copies if expert in kept]  # those of them that this pass uses
        self._copies = [expert for expert in copies if expert not in kept]
        self._keep_casts = keep_casts  # for later micro-batches of the step
        self._stacks: list[_Stack] = []  # in the order of `experts`; without owned experts that are read in place
        self._pending: list[Pending] = []
        self._reduction: Reduction | None = None  # whose own gradients may still have to be added

    @property
    def experts(self) -> list[int]:
        """Experts held here in the order of their rows: owned ones and kept copies by ascending id, then copies as they
        were added.
        """
        return self._owned + self._kept + self._copies

    def launch(self) -> None:
        """Go from SHARDED to GATHERING: start to gather the copies; in other states do nothing. Collective."""
        if self.state is not CopyState.SHARDED:
            return
        self._stacks = self._allocate()
        self._start(self.layer.gathered(self.placement))

    def extend(self, placement: Placement) -> None:
        """Also gather what `placement` has beyond the present one. In state GATHERING and not settled. Collective."""
        self._require(CopyState.GATHERING)
        owners, old = self.layer.owners, self.placement
        self._add_rows(self._new_experts(old, placement))
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
        self._pending, self._stacks, self.state = [], [], CopyState.SHARDED

    def parts(self) -> list[tuple[list[int], dict[str, Tensor]]]:
        """One part per stack of consecutive rows in memory: (positions in `experts`, views kind -> `[n, *shape]`).

        In state HELD. Views of stacks have version counters of their own: for backward, a shared buffer is written
        again with the same values, and autograd must not take that for a change of the tensors it saved.
        """
        self._require(CopyState.HELD)
        parts: list[tuple[list[int], dict[str, Tensor]]] = []
        if not self.layer.casts and (self._owned or not (self._kept or self._copies)):
            parts.append((list(range(len(self._owned))), self.layer.pool.weights_of(self.layer.place)))
        if self._kept:
            assert self.layer.kept is not None
            positions = range(len(self._owned), len(self._owned) + len(self._kept))
            parts.append((list(positions), self.layer.kept.weights_of(self.layer.place)))
        first = sum(len(positions) for positions, _ in parts)
        for stack in (s for s in self._stacks if s.experts or self.layer.casts):
            last = first + len(stack.experts)
            views = self.layer.layout.views(stack.rows.data[: len(stack.experts)])
            parts.append((list(range(first, last)), views))
            first = last
        return parts

    def take_gradients(self, grads: Mapping[str, Sequence[Tensor]]) -> bool:
        """Instead of `reduce`: make `grads` the owners' gradients as they are, if no expert has copies anywhere.

        Returns:
            Whether that was possible; see `ExpertPool.take_gradients`.
        """
        if self._anything_shared:
            return False
        own = {kind: stack for kind, (stack,) in grads.items()}
        return self.layer.pool.take_gradients(own, self.layer.comms.gradient_scale)

    def reduce(
        self, grads: Mapping[str, Sequence[Tensor]], target: Mapping[str, Tensor], fresh: bool = False
    ) -> Reduction:
        """Start to sum gradients at the owners. Collective.

        In state HELD. Gradients of experts that have copies are sent in `reduce_dtype`. Those of experts that only
        their owner holds are added by `Reduction.add_own`, so that nothing delays the launch.

        Args:
            grads: kind -> one stack of gradients `[n, *shape]` per part of `parts`.
            target: kind -> `[owned or more, *shape]`, where owners add them; see `ExpertPool.add_gradients`.
            fresh: whether `target` is of `ExpertPool.new_gradients`; it is adopted when `Reduction.add_own` has run.
        """
        self._require(CopyState.HELD)
        layer, owned = self.layer, len(self._owned)
        held = self.placement.matrix[self._owned].sum(axis=1)
        alone, shared = np.flatnonzero(held == 1).tolist(), np.flatnonzero(held > 1).tolist()
        travel = sorted(shared + list(range(owned, len(self.experts))), key=lambda i: self.experts[i])
        layout = layer.gradient_layout(grads)
        rows = self._room(len(travel), layout.numel)
        if travel:
            single = {kind: [row for stack in stacks for row in stack.unbind(0)] for kind, stacks in grads.items()}
            layout.pack({kind: [each[i] for i in travel] for kind, each in single.items()}, rows)
        contributed = dict(zip([self.experts[i] for i in travel], rows.unbind(0), strict=True))
        for gradient in target.values() if fresh else ():
            for first, last in runs(shared):
                gradient[first:last] = 0  # sums are added to them
        home, add_sums = self._reduce(shared, contributed, layout, target)
        own = {kind: stacks[0][:owned] for kind, stacks in grads.items()}

        def add_own() -> None:
            for first, last in runs(alone):
                part = {kind: stack[first:last] for kind, stack in own.items()}
                layer.pool.add_gradients(first, part, layer.comms.gradient_scale, target, fresh)
            if fresh:
                layer.pool.adopt(target)

        self._reduction = Reduction(home, add_own, add_sums)
        return self._reduction

    def add_own_gradients(self) -> None:
        """Add what the last `reduce` left for `Reduction.add_own`, if that was not done yet."""
        reduction, self._reduction = self._reduction, None
        if reduction is not None:
            reduction.add_own()

    def _room(self, count: int, numel: int) -> Tensor:
        """Memory for the gradients of `count` experts that have copies: where the transport has it, else the lane's."""
        layer, room = self.layer, None
        if layer.comms.reductions is not None and self._anything_shared:
            room = layer.comms.reductions.room_to_reduce(self._homeward(), numel, layer.dtypes.reduce)
        return layer.comms.gradients.arena.empty(count, numel, layer.dtypes.reduce) if room is None else room

    def _homeward(self) -> Moves:
        return moves_between(self.layer.owners, self.placement).reversed

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
        moves = self._homeward()
        layer.bytes_sent += len(moves.transfers) * layout.numel * wire.itemsize
        if _in_place(target) and all(transport.accumulates(wire, rows.dtype) for rows in target.values()):
            into = self._into(shared, layout, target)
            launch = partial(transport.accumulate, moves, contributed, into, layout.numel, wire)
            return layer.comms.gradients.start(layer.index, launch), partial(increment_version, list(target.values()))
        sums = layer.comms.gradients.arena.empty(len(shared), layout.numel, accumulation_dtype(wire))
        sums_of = dict(zip([self._owned[i] for i in shared], sums.unbind(0), strict=True))
        home = layer.comms.gradients.start(layer.index, lambda: transport.reduce(moves, contributed, sums_of, wire))

        def add() -> None:
            at = 0
            for first, last in runs(shared):
                part = layout.views(sums[at : at + last - first])
                layer.pool.add_gradients(first, part, layer.comms.gradient_scale, target)
                at += last - first

        return home, add

    def _into(self, shared: list[int], layout: ChunkLayout, target: Mapping[str, Tensor]) -> Into:
        """The owners' gradients as rows that get sums."""
        kinds = [KindRows(rows.view(len(rows), -1), layout.offset(kind)) for kind, rows in target.items() if len(rows)]
        return Into(kinds, {self._owned[i]: i for i in shared}, self.layer.comms.gradient_scale)

    def _require(self, state: CopyState) -> None:
        if self.state is not state:
            raise RuntimeError(f"{self.layer.name}: its copies are {self.state.value}, must be {state.value}")

    @property
    def _anything_shared(self) -> bool:
        return bool((self.placement.matrix.sum(axis=1) > 1).any())

    def _new_experts(self, old: Placement, new: Placement) -> list[int]:
        return (new - old).held_by(self.layer.comms.rank).tolist()

    def _allocate(self) -> list[_Stack]:
        """Memory for the copies, behind the casts of owned rows if there are any."""
        layer = self.layer
        experts = (self._owned if layer.casts else []) + self._copies
        if layer.shared is None:
            return [_Stack(experts, layer.rows(len(self._copies), self._keep_casts))]
        # Also for no rows: the tenant before must be released on all ranks alike.
        memory = layer.shared.lend(self, layer.index, layer.shared_bytes)
        rows = memory.view(layer.dtypes.param).view(layer.shared_rows, layer.layout.numel)
        if layer.casts:
            layer.layout.pack(layer.pool.weights_of(layer.place), rows[: len(self._owned)])
        return [_Stack(experts, rows)]

    def _add_rows(self, copies: list[int]) -> None:
        """Memory for copies that were not planned: behind the others if there is room, else a stack of their own."""
        layer, self._copies = self.layer, self._copies + copies
        layer.note_added(len(copies))
        *before, last = self._stacks
        if len(last.experts) + len(copies) <= len(last.rows):
            self._stacks = [*before, _Stack(last.experts + copies, last.rows)]
        else:
            rows = layer.arena.empty(len(copies), layer.layout.numel, layer.dtypes.param)
            self._stacks = [*self._stacks, _Stack(copies, rows)]

    def _row_of(self) -> dict[int, Tensor]:
        """Expert -> its row, of all that are in stacks."""
        return {expert: row for stack in self._stacks for expert, row in zip(stack.experts, stack.rows, strict=False)}

    def _start(self, moves: Moves) -> None:
        """Launch one gather into the buffer, if any device gets a copy."""
        layer, self.state = self.layer, CopyState.GATHERING
        transport = layer.comms.gathers
        if transport is None or not moves.transfers:
            return
        transport.room_to_gather(moves, layer.layout.numel, layer.dtypes.param)
        layer.bytes_sent += len(moves.transfers) * layer.layout.numel * layer.dtypes.param.itemsize
        row_of = self._row_of()
        sent = self._sent(moves, row_of)
        received = {e: row_of[e] for e in self._new_experts(moves.src, moves.dst)}
        self._pending.append(layer.comms.copies.start(layer.index, lambda: transport.gather(moves, sent, received)))

    def _sent(self, moves: Moves, row_of: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Rows that this device sends, packed and cast; `row_of` are those in stacks."""
        layer, rank = self.layer, self.layer.comms.rank
        leaving = sorted({t.expert for t in moves.transfers if t.src == rank})
        if layer.casts:
            return {e: row_of[e] for e in leaving}
        position = {e: i for i, e in enumerate(self._owned)}
        weights = layer.pool.weights_of(layer.place)
        rows = layer.comms.copies.arena.empty(len(leaving), layer.layout.numel, layer.dtypes.param)
        layer.layout.pack({k: [w[position[e]] for e in leaving] for k, w in weights.items()}, rows)
        return dict(zip(leaving, rows, strict=True))


def _in_place(target: Mapping[str, Tensor]) -> bool:
    """Whether sums can be added to the gradients' rows by a kernel: one dtype, contiguous."""
    return len({rows.dtype for rows in target.values()}) == 1 and all(r.is_contiguous() for r in target.values())
