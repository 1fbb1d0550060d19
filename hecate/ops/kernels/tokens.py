"""Tokens per expert, and the order in which token copies are sent.

Shapes: T tokens, k experts per token, N = T * k token copies, E experts, P (expert, device) pairs, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hecate.ops.kernels.launch import THREADS, Launch, ThreadOrder, run

__all__ = ["OTHER_BINS", "ExpertCounts", "blocks_of", "count_experts", "sort_copies", "tile_of"]

MAX_EXPERTS = 4096
"""More would not fit into the shared memory of a block."""
OTHER_BINS = 2
"""kOtherBins in csrc/cuda/sort.cuh."""
_COUNTER_BYTES = 16 * 1024
_TILES = 128


@dataclass(frozen=True)
class ExpertCounts:
    """How often each expert was chosen.

    Attributes:
        counts: int64 `[E + 2]`; the last two are the numbers of indices that are neither an expert nor -1, and of -1.
        tiles: int32 `[blocks, E + 2]`, the same per tile of copies, for `sort_copies`; see `tile_of`.
    """

    counts: Tensor
    tiles: Tensor


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
    tile, blocks = tile_of(flat.numel()), blocks_of(flat.numel())
    tiles = torch.empty(blocks, num_experts + OTHER_BINS, dtype=torch.int32, device=index.device)
    counts = torch.empty(num_experts + OTHER_BINS, dtype=torch.int64, device=index.device)
    args = (flat, tiles, counts, _finished(index.device), flat.numel(), tile, num_experts)
    run(Launch("sort", "count", blocks, (THREADS, 1), 4 * (num_experts + OTHER_BINS + 1), args), index.device, order)
    return ExpertCounts(counts, tiles)


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
    flat, num_experts = index.reshape(-1), counted.counts.numel() - OTHER_BINS
    in_order = torch.empty(rows, dtype=torch.int64, device=index.device)
    inverse = torch.empty(flat.numel(), dtype=torch.int64, device=index.device)
    walkers, tile = _walkers(num_experts), tile_of(flat.numel())
    shared = 4 * num_experts * (walkers + 1) + 2 * tile
    sizes = (flat.numel(), tile, num_experts, rows, walkers)
    args = (flat, counted.tiles, first, before, start, in_order, inverse, *sizes)
    blocks = -(-flat.numel() // tile)
    run(Launch("sort", "sort", blocks, (THREADS, 1), shared, args), index.device, order)
    return in_order, inverse


def _check(index: Tensor, num_experts: int) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"index: dtype {index.dtype}, must be torch.int64")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts={num_experts} must be in [1, {MAX_EXPERTS}] for the sorting kernel")
    if index.numel() >= 2**31:
        raise ValueError(f"index: {index.numel()} token copies on one device, must be fewer than 2**31")


def tile_of(copies: int) -> int:
    """1024 to 8192 copies per tile: more tiles run in parallel, but each reads the counts of all before it."""
    tile = 1024
    while tile < 8192 and copies > _TILES * tile:
        tile *= 2
    return tile


def blocks_of(copies: int) -> int:
    """Number of tiles, at least one."""
    return max(1, -(-copies // tile_of(copies)))


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
