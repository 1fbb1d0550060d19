"""The copies of one layer for one micro-batch: gathered, held, and their gradients sent home.

Where compute and master dtype agree, owned rows are read in place and the buffer holds copies only; otherwise the
buffer has a row per expert held (DESIGN, decision 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.order import accumulation_dtype
from hecate.collectives.schedule import Schedule, gather_schedule
from hecate.collectives.transport import Transport
from hecate.placement import Placement, Topology
from hecate.runtime.chunk import ChunkLayout, Dtypes
from hecate.runtime.overlap import ExposedTime, Lane, Pending
from hecate.runtime.pool import ExpertPool

__all__ = ["Comms", "CopiesMemory", "CopyState", "LayerCopies", "PoolLayer", "Reduction", "SharedBuffers"]


class CopyState(Enum):
    """Which memory the copies of one layer have.

    SHARDED: none; every expert is with its owner only.
    GATHERING: a buffer that transfers are writing; it must not be read.
    HELD: a buffer that may be read.
    """

    SHARDED = "sharded"
    GATHERING = "gathering"
    HELD = "held"


@dataclass(frozen=True)
class Comms:
    """Everything that talks: made once, shared by all layers.

    Attributes:
        rank: this device among those that share the experts.
        topology: of these devices.
        tokens: process group of the token exchange; None on one device.
        experts: transport of copies and gradients; None on one device.
        copies: lane of spAG, so that prefetch runs beside compute.
        gradients: lane of spRS, so that a reduction does not queue behind the next layer's copies.
        exposed: what compute waited for.
        gradient_scale: 1 / number of these devices, as DDP and FSDP average; replicas are averaged on top.
        replicated: whether other devices train the same experts on other tokens.
        guard: makes a context in which a failed collective names the ranks that are missing.
    """

    rank: int
    topology: Topology
    tokens: dist.ProcessGroup | None
    experts: Transport | None
    copies: Lane
    gradients: Lane
    exposed: ExposedTime
    gradient_scale: float
    replicated: bool
    guard: Callable[[], AbstractContextManager[None]]


class CopiesMemory:
    """Bytes that buffers of copies take on this device, now and at most."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def add(self, num_bytes: int) -> None:
        """Count an allocation, or with a negative number a release."""
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


class SharedBuffers:
    """Two buffers that serve the copies of all layers in turn, for re-materialization (paper, section 4.2)."""

    def __init__(self, memory: CopiesMemory) -> None:
        self._memory = memory
        self._bytes = [torch.empty(0, dtype=torch.uint8)] * 2
        self._tenant: list[LayerCopies | None] = [None, None]

    def reserve(self, num_bytes: int, device: torch.device) -> None:
        """Make both at least that large. Between steps only: autograd may keep views while one runs."""
        if self._bytes[0].numel() < num_bytes:
            self.evict()
            self._memory.add(2 * (num_bytes - self._bytes[0].numel()))
            with torch.inference_mode(False):  # an evaluation may come first; training must be able to save views
                self._bytes = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]

    def lend(self, tenant: LayerCopies, turn: int, num_bytes: int) -> Tensor:
        """Bytes of one of them; whoever had it holds nothing any more."""
        before, self._tenant[turn % 2] = self._tenant[turn % 2], tenant
        if before is not None and before is not tenant:
            before.release()
        return self._bytes[turn % 2][:num_bytes]

    def evict(self) -> None:
        """Release both, for example because the weights changed."""
        for tenant in self._tenant:
            if tenant is not None:
                tenant.release()
        self._tenant = [None, None]


@dataclass
class PoolLayer:
    """One layer of a pool: what its copies of every micro-batch share.

    Attributes:
        index: of the layer in the model.
        pool, row: the pool and the layer's place in it.
        layout: of a copy; `gradients`: of its gradient (trainable kinds only).
        capacity: copies a device may hold.
        shared: the buffers to use instead of own ones; None without re-materialization.
        memory: where own buffers are counted.
        bytes_sent: on all links together, since the last step.
    """

    index: int
    pool: ExpertPool
    row: int
    dtypes: Dtypes
    comms: Comms
    capacity: int
    shared: SharedBuffers | None
    memory: CopiesMemory
    layout: ChunkLayout = field(init=False)
    gradients: ChunkLayout = field(init=False)
    bytes_sent: int = 0

    def __post_init__(self) -> None:
        self.layout = ChunkLayout(self.pool.weights)
        self.gradients = ChunkLayout([w for w in self.pool.weights if w.trainable])

    @property
    def casts(self) -> bool:
        return self.dtypes.param != self.dtypes.master

    @property
    def buffer_rows(self) -> int:
        """Rows of a buffer: `capacity` copies, and the owned experts where they are cast."""
        return self.capacity + (len(self.owned) if self.casts else 0)

    @property
    def buffer_bytes(self) -> int:
        """Size of a buffer."""
        return self.buffer_rows * self.layout.numel * self.dtypes.param.itemsize

    @property
    def owners(self) -> Placement:
        return self.pool.placement(self.row)

    @property
    def owned(self) -> list[int]:
        return self.pool.owned(self.row).tolist()


class Reduction:
    """Gradients on their way to the owners."""

    def __init__(self, home: Pending, add: Callable[[], None]) -> None:
        self._home = home
        self._add = add

    def finish(self) -> None:
        """Add the sums to the owners' gradients."""
        self._home.wait()
        self._add()

    def discard(self) -> None:
        """Only let the transfers end: the backward pass that they belong to failed."""
        self._home.wait()


class LayerCopies:
    """The experts that this device computes in one layer and micro-batch: owned rows first, then copies."""

    def __init__(self, layer: PoolLayer, placement: Placement, micro_batch: int) -> None:
        self.layer = layer
        self.micro_batch = micro_batch
        self.placement = placement
        self.state = CopyState.SHARDED
        self._owned = layer.owned
        self._copies = self._new_experts(layer.owners, placement)
        self._buffer: Tensor | None = None
        self._pending: list[Pending] = []

    @property
    def experts(self) -> list[int]:
        """Experts held here in the order of their rows: owned ascending, then copies as they came."""
        return self._owned + self._copies

    def launch(self) -> None:
        """SHARDED to GATHERING: start to bring the copies here. Collective."""
        if self.state is not CopyState.SHARDED:
            return
        self._allocate()
        self._start(gather_schedule(self.layer.owners, self.placement))

    def extend(self, placement: Placement) -> None:
        """Gather the experts that `placement` has beyond the present one, behind the copies. Collective."""
        owners, old = self.layer.owners, self.placement
        self._copies = self._copies + self._new_experts(old, placement)
        self.placement = placement
        self._start(gather_schedule(owners, owners | (placement - old)))

    def ensure_held(self) -> None:
        """Return in state HELD: wait for the copies, or gather them now if they were released."""
        self.launch()
        for pending in self._pending:
            pending.wait()
        self._pending = []
        self.state = CopyState.HELD

    def release(self) -> None:
        """Back to SHARDED."""
        for pending in self._pending:
            pending.wait()
        if self._buffer is not None and self.layer.shared is None:
            self.layer.memory.add(-self.layer.buffer_bytes)
        self._pending, self._buffer, self.state = [], None, CopyState.SHARDED

    def parts(self) -> list[tuple[list[int], dict[str, Tensor]]]:
        """(positions in `experts`, views kind -> `[n, *shape]`): one part a stack of consecutive rows in memory.

        Views of the buffer have version counters of their own: a buffer is written again for backward, with the same
        values, and autograd must not take that for a change of what it saved.
        """
        owned = list(range(len(self._owned)))
        copies = list(range(len(owned), len(self.experts)))
        buffer = None if self._buffer is None else self._buffer.data
        if self.layer.casts:
            assert buffer is not None
            return [(owned + copies, self.layer.layout.views(buffer[: len(self.experts)]))]
        parts = [(owned, self.layer.pool.weights_of(self.layer.row))]
        if copies:
            assert buffer is not None
            parts.append((copies, self.layer.layout.views(buffer[: len(copies)])))
        return parts

    def reduce(self, grads: Mapping[str, Sequence[Tensor]]) -> Reduction:
        """Start to add gradients kind -> one `[*shape]` an expert held here to the owners'. Collective.

        Experts that only their owner holds are added at once; the others travel in `reduce_dtype`.
        """
        layer, owned = self.layer, self._owned
        held = self.placement.matrix.sum(axis=1)
        alone = [i for i, e in enumerate(owned) if held[e] == 1]
        shared = [i for i, e in enumerate(owned) if held[e] > 1]
        travel = shared + list(range(len(owned), len(self.experts)))
        own = {kind: [grad[i] for i in alone] for kind, grad in grads.items()}
        layer.pool.add_gradients(layer.row, alone, own, layer.comms.gradient_scale)
        rows = self._gradient_rows(len(travel), layer.dtypes.reduce)
        layer.gradients.pack({kind: [grad[i] for i in travel] for kind, grad in grads.items()}, rows)
        return self._reduce(shared, dict(zip([self.experts[i] for i in travel], rows, strict=True)))

    def _reduce(self, shared: list[int], contributed: dict[int, Tensor]) -> Reduction:
        layer, wire = self.layer, self.layer.dtypes.reduce
        transport = layer.comms.experts
        if transport is None or not self._anything_shared:
            return Reduction(Pending(lambda: None), lambda: None)
        schedule = gather_schedule(layer.owners, self.placement).reversed
        sums = self._gradient_rows(len(shared), accumulation_dtype(wire))
        sums_of = dict(zip([self._owned[i] for i in shared], sums, strict=True))
        layer.bytes_sent += schedule.num_transfers * layer.gradients.numel * wire.itemsize
        home = layer.comms.gradients.start(layer.index, lambda: transport.reduce(schedule, contributed, sums_of, wire))

        def add() -> None:
            layer.pool.add_gradients(layer.row, shared, layer.gradients.views(sums), layer.comms.gradient_scale)

        return Reduction(home, add)

    @property
    def _anything_shared(self) -> bool:
        return bool((self.placement.matrix.sum(axis=1) > 1).any())

    def _new_experts(self, old: Placement, new: Placement) -> list[int]:
        return (new - old).held_by(self.layer.comms.rank).tolist()

    def _gradient_rows(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, self.layer.gradients.numel, dtype=dtype, device=self.layer.pool.device)

    def _allocate(self) -> None:
        layer = self.layer
        if layer.buffer_rows == 0 and not layer.casts:
            return
        if layer.shared is not None:
            memory = layer.shared.lend(self, layer.index, layer.buffer_bytes)
        else:
            memory = torch.empty(layer.buffer_bytes, dtype=torch.uint8, device=layer.pool.device)
            layer.memory.add(layer.buffer_bytes)
        self._buffer = memory.view(layer.dtypes.param).view(layer.buffer_rows, layer.layout.numel)
        if layer.casts:
            layer.layout.pack(layer.pool.weights_of(layer.row), self._buffer[: len(self._owned)])

    def _start(self, schedule: Schedule) -> None:
        """Launch one gather into the buffer; nothing to do where nobody copies."""
        layer, self.state = self.layer, CopyState.GATHERING
        transport = layer.comms.experts
        if transport is None or not schedule.rounds:
            return
        layer.bytes_sent += schedule.num_transfers * layer.layout.numel * layer.dtypes.param.itemsize
        sent, received = self._sent(schedule), self._received(schedule)
        self._pending.append(layer.comms.copies.start(layer.index, lambda: transport.gather(schedule, sent, received)))

    def _sent(self, schedule: Schedule) -> dict[int, Tensor]:
        """Rows that leave this device, packed and cast."""
        layer, rank = self.layer, self.layer.comms.rank
        leaving = sorted({t.expert for transfers in schedule.rounds for t in transfers if t.src == rank})
        position = {e: i for i, e in enumerate(self._owned)}
        if layer.casts and self._buffer is not None:
            return {e: self._buffer[position[e]] for e in leaving}
        weights = layer.pool.weights_of(layer.row)
        rows = next(iter(weights.values())).new_empty(len(leaving), layer.layout.numel)
        layer.layout.pack({k: [w[position[e]] for e in leaving] for k, w in weights.items()}, rows)
        return dict(zip(leaving, rows, strict=True))

    def _received(self, schedule: Schedule) -> dict[int, Tensor]:
        """Rows of the buffer that the schedule's copies go to."""
        arriving = self._new_experts(schedule.src, schedule.dst)
        first = len(self._owned) if self.layer.casts else 0
        position = {e: first + i for i, e in enumerate(self._copies)}
        return {} if self._buffer is None else {e: self._buffer[position[e]] for e in arriving}
