"""The kernels that count and sort token copies, on the CPU, against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from hecate._native import sort_tables
from hecate.ops.kernels.launch import ThreadOrder
from hecate.ops.kernels.tokens import count_experts, sort_copies
from hecate.ops.permute import invert
from hecate.placement import Placement, Topology
from hecate.planning.quota import exact_quota
from tests.ops.kernels.shared import orders

CASES = [(0, 2, 4), (1, 1, 1), (1, 3, 8), (300, 2, 5), (1700, 4, 64), (700, 8, 300), (90, 2, 4096)]


def random_index(tokens: int, top_k: int, experts: int, dropped: float = 0.1) -> Tensor:
    """Skewed choices; some copies have no expert, and some experts no copy."""
    rng = np.random.default_rng(tokens + experts)
    index = (experts * rng.random((tokens, top_k)) ** 2).astype(np.int64)
    index[rng.random(index.shape) < dropped] = -1
    return torch.from_numpy(index)


def random_pairs(index: Tensor, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, share of each pair, destination of each pair): each expert's copies over 1 to 3 destinations."""
    rng = np.random.default_rng(experts)
    flat = index.flatten().numpy()
    first, share, destination = [0], [], []
    for e in range(experts):
        holders = np.sort(rng.choice(4, rng.integers(1, 4), replace=False))
        cuts = np.sort(rng.integers(0, (flat == e).sum() + 1, len(holders) - 1))
        share.extend(np.diff([0, *cuts, (flat == e).sum()]))
        destination.extend(holders)
        first.append(len(share))
    return np.array(first), np.array(share), np.array(destination)


@orders
@pytest.mark.parametrize(("tokens", "top_k", "experts"), CASES)
def test_counts(tokens: int, top_k: int, experts: int, order: ThreadOrder) -> None:
    index = random_index(tokens, top_k, experts)
    flat = index.flatten()
    for _ in range(2):  # the second finds what the first left of the counter of finished blocks
        counts = count_experts(index, experts, order).counts
        assert counts[:-2].tolist() == torch.bincount(flat[flat >= 0], minlength=experts).tolist()
        assert counts[-2:].tolist() == [0, (flat < 0).sum()]


def test_numbers_that_are_no_expert_are_counted_apart() -> None:
    index = torch.tensor([[0, 3], [-1, -2], [2, 2**40]])
    assert count_experts(index, 3).counts.tolist() == [1, 0, 1, 3, 1]


@orders
@pytest.mark.parametrize(("tokens", "top_k", "experts"), CASES)
def test_order_is_stable_by_destination_and_expert(tokens: int, top_k: int, experts: int, order: ThreadOrder) -> None:
    index = random_index(tokens, top_k, experts)
    first, share, destination = random_pairs(index, experts)
    pair_expert = np.repeat(np.arange(experts), np.diff(first))
    # Reference: give every copy its pair, then sort stably by (destination, expert).
    flat, pair_of = index.flatten().numpy(), np.full(index.numel(), -1)
    for e in range(experts):
        copies = np.flatnonzero(flat == e)
        pair_of[copies] = np.repeat(np.arange(first[e], first[e + 1]), share[first[e] : first[e + 1]])
    kept = np.flatnonzero(flat >= 0)
    expected = kept[np.lexsort((kept, flat[kept], destination[pair_of[kept]]))]

    by_wire = np.lexsort((pair_expert, destination))
    start = np.empty_like(share)
    start[by_wire] = np.cumsum(share[by_wire]) - share[by_wire]
    before = np.concatenate([np.cumsum(share[a:b]) - share[a:b] for a, b in itertools.pairwise(first)])
    counted = count_experts(index, experts, order)
    tensors = [torch.from_numpy(array.astype(np.int64)) for array in (first, before, start)]
    in_order, inverse = sort_copies(index, counted, *tensors, rows=len(kept), order=order)
    assert in_order.tolist() == expected.tolist()
    assert inverse[in_order].tolist() == list(range(len(kept)))
    assert (inverse[torch.from_numpy(flat) < 0] == -1).all()


def test_order_is_that_of_the_dispatch() -> None:
    """From a quota to the rows' order, as `hecate.runtime.tokens.direct` makes it on the host."""
    index, rank = random_index(500, 3, 16, dropped=0.0), 2
    rng = np.random.default_rng(0)
    placement = Placement.even(16, 4) | Placement(rng.random((16, 4)) < 0.3)
    counts = rng.integers(0, 200, (4, 16))
    counts[rank] = np.bincount(index.flatten(), minlength=16)
    quota = exact_quota(counts, placement, Topology(4, 2))
    share = quota[rank]
    expert, holder = np.nonzero(placement.matrix)
    by_expert = torch.argsort(index.flatten(), stable=True)
    blocks = by_expert.split(share.tolist())
    expected = torch.cat([blocks[pair] for pair in np.lexsort((expert, holder))])

    held, pairs = placement.held_by(rank).tolist(), np.stack([expert, holder], axis=1)
    table, sent, _, _ = sort_tables(pairs, quota, rank, held, 16)
    first, before, start = torch.from_numpy(table[: 17 + 2 * len(pairs)]).split([17, len(pairs), len(pairs)])
    assert sum(sent) == index.numel()
    order, inverse = sort_copies(index, count_experts(index, 16), first, before, start, rows=index.numel())
    assert order.tolist() == expected.tolist()
    assert inverse.tolist() == invert(expected).tolist()


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"index: dtype torch.int32, must be torch.int64"):
        count_experts(torch.zeros(2, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"num_experts=5000 must be in \[1, 4096\]"):
        count_experts(torch.zeros(2, 2, dtype=torch.int64), 5000)
