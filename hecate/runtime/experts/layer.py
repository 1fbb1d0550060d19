"""The experts of one layer on this device: what is common to their copies in all micro-batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hecate.collectives.moves import Moves, moves_between
from hecate.experts import Dtypes
from hecate.placement import Placement
from hecate.runtime.arena import Arena
from hecate.runtime.comms import Comms
from hecate.runtime.experts.buffers import SharedBuffers
from hecate.runtime.experts.casts import CastStamp, CastWatch
from hecate.runtime.experts.kept import KeptCopies
from hecate.runtime.experts.layout import ChunkLayout
from hecate.runtime.experts.pool import ExpertPool

__all__ = ["LayerExperts"]


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
        shared: the buffers of re-materialization; None: each micro-batch takes memory from `arena`.
        arena: memory for copies and for casts of owned rows.
        watch: says whether casts of owned rows may be used again.
        kernels: whether Hecate's kernels run.
        kept: copies that stay between steps; None: the policy keeps none.
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
    arena: Arena
    watch: CastWatch
    kernels: bool = False
    kept: KeptCopies | None = None
    layout: ChunkLayout = field(init=False)
    bytes_sent: int = 0
    _kept: tuple[Tensor, CastStamp] | None = None
    _added: int = 0  # most copies that a micro-batch of this step has added after the gate
    _room: int = 0  # the same, of this step and the last one

    def __post_init__(self) -> None:
        self.layout = ChunkLayout(self.pool.weights, self.kernels)

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
        if comms.gathers is None or comms.reductions is None or not moves.transfers:
            return
        gathered = moves if self.kept is None else self.gathered(placement)
        if gather and gathered.transfers:
            comms.gathers.prepare_gather(gathered, self.layout.numel * self.dtypes.param.itemsize)
        if gradient := self.gradient_layout().numel:
            comms.reductions.prepare_reduce(moves.reversed, gradient, self.dtypes.reduce)

    def gathered(self, placement: Placement) -> Moves:
        """How copies get to the holders in `placement` that do not keep them."""
        if self.kept is None:
            return moves_between(self.owners, placement)
        return moves_between(self.owners, self.owners | (placement - self.kept_placement))

    @property
    def kept_placement(self) -> Placement:
        """The owner of each expert, and the devices that keep copies between steps."""
        return self.owners if self.kept is None else self.kept.placements[self.place]

    def take_bytes_sent(self) -> int:
        """`bytes_sent`, with what kept copies have sent; counting begins anew."""
        sent, self.bytes_sent = self.bytes_sent, 0
        if self.kept is not None:
            sent, self.kept.bytes_sent[self.place] = sent + self.kept.bytes_sent[self.place], 0
        return sent

    @property
    def casts(self) -> bool:
        """Whether experts compute in another dtype than owned weights have."""
        return any(p.dtype != self.dtypes.param for p in self.pool.parameters.values())

    @property
    def num_owned(self) -> int:
        """Number of this device's experts."""
        return len(self.pool.owned(self.place))

    @property
    def most_copies(self) -> int:
        """Most copies that this device may gather at once; a policy that keeps copies gathers none."""
        return 0 if self.kept is not None else min(self.memory_slots, self.owners.num_experts - self.num_owned)

    @property
    def shared_rows(self) -> int:
        """Rows of a shared buffer: one per copy that the layer may ever have, and one per owned expert if cast."""
        return self.most_copies + (self.num_owned if self.casts else 0)

    @property
    def shared_bytes(self) -> int:
        """Bytes that this layer needs of a shared buffer."""
        return self.shared_rows * self.layout.numel * self.dtypes.param.itemsize

    def rows(self, copies: int, keep: bool) -> Tensor:
        """`[>= casts + copies, numel]` in compute dtype; `casts` is the number of owned experts, or 0 without casts.

        The first rows are the owned experts. If an earlier micro-batch has kept them, is through with them and
        `CastWatch` allows it, nothing is cast. There is room for as many further copies as were added after the gate
        lately, so that they need no stack and no grouped product of their own.

        Args:
            copies: rows for copies, whose values the caller writes.
            keep: whether a later micro-batch may use the casts again; False for passes without gradients.
        """
        if not (self.casts and keep):
            self._kept = None
            return self._cast(copies)
        if self._kept is None or not self._usable(*self._kept, copies):
            self._kept = None  # its memory may be used at once
            self._kept = self._cast(copies), self.watch.stamp()
        return self._kept[0][:]  # a tensor of its own, so that `lent_once` sees whether it is used

    def note_added(self, copies: int) -> None:
        """A micro-batch has added so many copies after the gate."""
        self._added, self._room = max(self._added, copies), max(self._room, copies)

    def end_step(self) -> None:
        """Give the memory of kept casts back."""
        self._kept = None
        self._room, self._added = self._added, 0

    def outdated(self) -> str | None:
        """For HECATE_DEBUG=1: why the kept casts are not those of the weights; None if nothing is wrong."""
        if self._kept is None or not self.watch.holds(self._kept[1]):
            return None
        owned = self.num_owned
        pair = self._kept[0][:owned], self._cast(0)[:owned]
        views = (self.layout.views(rows.nan_to_num()) for rows in pair)  # without padding
        if all(torch.equal(a, b) for a, b in zip(*(v.values() for v in views), strict=True)):
            return None
        return (
            f"{self.name}: its weights were written between two micro-batches of one step in a way that PyTorch does "
            "not count, through .data, torch._foreach_* or another tensor with their memory; write to the parameters "
            "themselves, under torch.no_grad()"
        )

    def _usable(self, rows: Tensor, stamp: CastStamp, copies: int) -> bool:
        enough = len(rows) >= self.num_owned + copies
        return enough and self.watch.holds(stamp) and self.arena.lent_once(rows)

    def _cast(self, copies: int) -> Tensor:
        owned = self.num_owned if self.casts else 0
        copies = max(copies, min(copies + self._room, self.most_copies))
        rows = self.arena.empty(owned + copies, self.layout.numel, self.dtypes.param)
        if owned:
            self.layout.pack(self.pool.weights_of(self.place), rows[:owned])
        return rows

    @property
    def owners(self) -> Placement:
        """The owner of each expert, as a placement."""
        return self.pool.placement(self.place)

    @property
    def owned(self) -> list[int]:
        """Ascending ids of this device's experts."""
        return self.pool.owned(self.place).tolist()
