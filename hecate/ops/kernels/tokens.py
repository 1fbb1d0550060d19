"""Tokens per expert, and the order in which token copies are sent.

Shapes: T tokens, k experts per token, N = T * k token copies, E experts, P (expert, device) pairs, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hecate.ops.kernels.launch import THREADS, Launch, ThreadOrder, run, to_device
from hecate.placement import Placement

__all__ = ["ExpertCounts", "Pairs", "count_experts", "sort_copies"]

MAX_EXPERTS = 4096
"""More would not fit into the shared memory of a block."""
_COUNTER_BYTES = 16 * 1024
_TILES = 128


@dataclass(frozen=True)
class ExpertCounts:
    """How often each expert was chosen.

    Attributes:
        counts: int64 `[E + 1]`; the last is the number of indices that are neither an expert nor -1.
        tiles: int32 `[blocks, E + 1]`, the same per tile of copies, for `sort_copies`.
        tile: copies per tile.
    """

    counts: Tensor
    tiles: Tensor
    tile: int


@dataclass(frozen=True)
class Pairs:
    """The (expert, device) pairs of a placement, ascending, on the device of the tokens.

    Attributes:
        first: int64 `[E + 1]`, the pairs of expert e are `[first[e], first[e + 1])`.
        expert: int64 `[P]`.
        wire: int64 `[P]`, the pairs in the order in which rows are sent: by device, then by expert.
    """

    first: Tensor
    expert: Tensor
    wire: Tensor

    @classmethod
    def of(cls, placement: Placement, device: torch.device) -> Pairs:
        """The pairs of `placement`; does not synchronize with `device`."""
        expert, holder = np.nonzero(placement.matrix)
        first = np.searchsorted(expert, np.arange(placement.num_experts + 1))
        sizes = [len(first), len(expert), len(expert)]
        return cls(*to_device(np.concatenate([first, expert, np.lexsort((expert, holder))]), device).split(sizes))

    def offsets(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """`before` and `start` of `sort_copies`, without synchronization.

        Args:
            share: int64 `[P]`, this device's row of the quota.
        """
        earlier = share.cumsum(0) - share
        before = earlier - earlier[self.first[self.expert]]
        sent = share[self.wire]
        return before, torch.empty_like(share).scatter_(0, self.wire, sent.cumsum(0) - sent)


def count_experts(index: Tensor, num_experts: int, order: ThreadOrder = "ascending") -> ExpertCounts:
    """Count copies per expert; one launch, no synchronization.

    Args:
        index: int64 `[T, k]`, the expert of each copy, or -1 for none.
        num_experts: E, at most 4096.
        order: of emulated threads.

    Raises:
        ValueError: too many experts or copies.
        TypeError: `index` is not int64.
    """
    _check(index, num_experts)
    flat = index.reshape(-1)
    tile = _tile(flat.numel())
    blocks = max(1, -(-flat.numel() // tile))
    tiles = torch.empty(blocks, num_experts + 1, dtype=torch.int32, device=index.device)
    counts = torch.empty(num_experts + 1, dtype=torch.int64, device=index.device)
    args = (flat, tiles, counts, _finished(index.device), flat.numel(), tile, num_experts)
    run(Launch("sort", "count", blocks, (THREADS, 1), 4 * (num_experts + 2), args), index.device, order)
    return ExpertCounts(counts, tiles, tile)


def sort_copies(
    index: Tensor,
    counted: ExpertCounts,
    first: Tensor,
    before: Tensor,
    start: Tensor,
    rows: int,
    order: ThreadOrder = "ascending",
) -> tuple[Tensor, Tensor]:
    """Sort copies stably by where `start` puts each pair of expert and destination; one launch, no synchronization.

    The copies of an expert, in ascending order, go to the expert's pairs one after another.

    Args:
        index: as counted.
        counted: from `count_experts`.
        first: int64 `[E + 1]`; the pairs of expert e are `[first[e], first[e + 1])`, at least one.
        before: int64 `[P]`, copies of the expert that go to its pairs before this one; 0 for the first.
        start: int64 `[P]`, the first row of this pair.
        rows: M, number of copies that have an expert.
        order: of emulated threads.

    Returns:
        int64 `[M]`, the copy in each row, and int64 `[N]`, the row of each copy, -1 for copies without an expert.
    """
    flat, num_experts = index.reshape(-1), counted.counts.numel() - 1
    in_order = torch.empty(rows, dtype=torch.int64, device=index.device)
    inverse = torch.empty(flat.numel(), dtype=torch.int64, device=index.device)
    walkers = _walkers(num_experts)
    shared = 4 * num_experts * (walkers + 1) + 2 * counted.tile
    sizes = (flat.numel(), counted.tile, num_experts, rows, walkers)
    args = (flat, counted.tiles, first, before, start, in_order, inverse, *sizes)
    blocks = -(-flat.numel() // counted.tile)
    run(Launch("sort", "sort", blocks, (THREADS, 1), shared, args), index.device, order)
    return in_order, inverse


def _check(index: Tensor, num_experts: int) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"index: dtype {index.dtype}, must be torch.int64")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts={num_experts} must be in [1, {MAX_EXPERTS}] for the sorting kernel")
    if index.numel() >= 2**31:
        raise ValueError(f"index: {index.numel()} token copies on one device, must be fewer than 2**31")


def _tile(copies: int) -> int:
    """1024 to 8192 copies per tile: more tiles run in parallel, but each reads the counts of all before it."""
    tile = 1024
    while tile < 8192 and copies > _TILES * tile:
        tile *= 2
    return tile


def _walkers(num_experts: int) -> int:
    """A power of two up to 32 such that their counters fit into 16 KiB."""
    walkers = 32
    while walkers > 1 and 4 * num_experts * walkers > _COUNTER_BYTES:
        walkers //= 2
    return walkers


def _finished(device: torch.device) -> Tensor:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _finished_on(device, stream)


@lru_cache
def _finished_on(device: torch.device, stream: int) -> Tensor:
    """The counter of finished blocks, which is 0 between launches; launches of one stream may share it."""
    return torch.zeros(1, dtype=torch.int32, device=device)
