"""The exact quota against HiGHS, the even one against its definition, and invariants of both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.placement import Placement, Topology
from hecate.planning.quota import even_quota, exact_quota, holder_loads, min_max_loads, sent_rows
from tests.planning.oracles import (
    even_dispatch,
    locality,
    lp_locality,
    lp_min_max,
    pair_loads,
    placed_counts,
    random_case,
)


@pytest.mark.parametrize("seed", range(60))
def test_exact_quota_is_optimal_to_within_a_token(seed: int) -> None:
    counts, _, placement, topology = random_case(seed)
    busiest = pair_loads(exact_quota(counts, placement, topology), placement).max()
    best = lp_min_max(counts.sum(axis=0), placement)
    assert best - 1e-6 <= busiest < best + 1
    assert busiest == min_max_loads(counts.sum(axis=0)[None], placement)[0]
    held = holder_loads(counts.sum(axis=0), placement)
    assert busiest == np.bincount(np.nonzero(placement.matrix)[1], held).max()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_token_is_placed_once_and_never_worse_than_evenly(seed: int) -> None:
    counts, _, placement, topology = random_case(seed)
    exact, even = exact_quota(counts, placement, topology), even_quota(counts, placement, topology)
    for quota in (exact, even):
        assert quota.shape == (topology.num_devices, placement.matrix.sum())
        assert (quota >= 0).all()
        assert (placed_counts(quota, placement) == counts).all()
    assert pair_loads(exact, placement).max() <= pair_loads(even, placement).max()


@pytest.mark.parametrize("seed", range(40))
def test_own_device_first_but_98_percent_of_the_own_node(seed: int) -> None:
    counts, _, placement, topology = random_case(1000 + seed)
    limit = int(min_max_loads(counts.sum(axis=0)[None], placement)[0])
    own, node = locality(exact_quota(counts, placement, topology), placement, topology)
    most_own = lp_locality(counts, placement, topology, limit, 1, 0)
    most_node = lp_locality(counts, placement, topology, limit, 0, 1)
    assert node >= 0.98 * most_node - 1
    weight = 1000.0
    node_under_most_own = lp_locality(counts, placement, topology, limit, weight, 1) - weight * most_own
    if node_under_most_own >= 0.98 * most_node:  # the two are not at odds: own device above all
        assert own >= most_own - 1e-4
        assert node >= node_under_most_own - 1e-2


@pytest.mark.parametrize("seed", range(20))
def test_even_quota_is_the_papers_dispatch(seed: int) -> None:
    counts, _, placement, topology = random_case(2000 + seed)
    quota = even_quota(counts, placement, topology)
    assert np.abs(quota - even_dispatch(counts, placement, topology)).max() < 1


def test_totals_up_to_2_to_the_40() -> None:
    counts = np.zeros((4, 4), dtype=np.int64)
    counts[0, 0] = 2**40
    everywhere, topology = Placement(np.ones((4, 4))), Topology(4, 2)
    assert (pair_loads(exact_quota(counts, everywhere, topology), everywhere) == 2**38).all()


def test_remainders_do_not_all_go_to_the_first_holder() -> None:
    everywhere = Placement([[True, True, False, False]] * 1)
    counts = np.ones((4, 1), dtype=np.int64)
    quota = even_quota(counts, everywhere, Topology(4, 4))
    assert quota.sum(axis=0).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((3, 2), dtype=np.int64), r"counts: shape \(3, 2\).*num_devices=2"),
        (np.ones((2, 2)), "dtype float64; must be integers"),
        (np.array([[1, -3], [0, 0]]), "-3 tokens of device 0 for expert 1, must be >= 0"),
        (np.full((2, 2), 2**40), r"must be <= 2\*\*40"),
        (np.full((2, 2), 2**62), r"must be <= 2\*\*40"),
    ],
)
def test_bad_counts_are_named(counts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_quota(counts, Placement(np.eye(2)), Topology(2, 2))


def test_an_expert_without_holder_is_named() -> None:
    with pytest.raises(ValueError, match="expert 1 has no holder"):
        exact_quota(np.ones((2, 2), dtype=np.int64), Placement([[1, 0], [0, 0]]), Topology(2, 2))


def test_another_topology_is_refused() -> None:
    with pytest.raises(ValueError, match="2 devices, topology 4"):
        even_quota(np.ones((2, 2), dtype=np.int64), Placement(np.eye(2)), Topology(4, 2))


@pytest.mark.parametrize("seed", range(10))
def test_sent_rows_are_the_sums_over_the_pairs_of_each_destination(seed: int) -> None:
    counts, _, placement, topology = random_case(seed)
    quota, holders = exact_quota(counts, placement, topology), np.argwhere(placement.matrix)
    expected = np.zeros((topology.num_devices,) * 2, dtype=np.int64)
    for pair, (_, device) in enumerate(holders):
        expected[:, device] += quota[:, pair]
    assert np.array_equal(sent_rows(holders, quota, topology.num_devices), expected)
    # Devices without any pair receive nothing.
    assert sent_rows(np.array([[0, 1]]), np.array([[5], [7], [0]]), 3).tolist() == [[0, 5, 0], [0, 7, 0], [0, 0, 0]]
