"""The quota kernel, on the CPU, against the host's solver: equal in every number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecate.ops.kernels.launch import ThreadOrder
from hecate.ops.kernels.quota import QuotaProblem, exact_quota
from hecate.placement import Placement, Topology
from hecate.planning import quota as host
from tests.ops.kernels.shared import ORDERS, orders
from tests.planning.oracles import pair_loads, random_case

CPU = torch.device("cpu")


def check(seed: int, order: ThreadOrder = "ascending", shared_bytes: int = 2**30) -> None:
    counts, _, placement, topology = random_case(seed)
    problem = QuotaProblem.of(placement, topology, CPU)
    quota, limit = exact_quota(torch.from_numpy(counts), problem, order, shared_bytes)
    expected = host.exact_quota(counts, placement, topology)
    assert np.array_equal(quota.numpy(), expected), f"seed {seed}"
    assert limit.item() == pair_loads(expected, placement).max()


def test_has_the_numbers_of_the_hosts_solver() -> None:
    for seed in range(300):
        check(seed, ORDERS[seed % 3], shared_bytes=2**30 if seed % 2 else 0)


@pytest.mark.long
def test_has_the_numbers_of_the_hosts_solver_in_many_cases() -> None:
    for seed in range(1000, 101_000):
        check(seed)


@orders
def test_large(order: ThreadOrder) -> None:
    """64 devices in 8 nodes, 256 experts with skewed loads, two copies per device."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(40 * rng.pareto(1.2, 256), (64, 256)).astype(np.int64)
    matrix = np.zeros((256, 64), dtype=np.bool_)
    matrix[np.arange(256), np.arange(256) // 4] = True
    hottest = np.argsort(-counts.sum(axis=0))[:32]
    for device in range(64):
        matrix[rng.choice(hottest, 2, replace=False), device] = True
    placement, topology = Placement(matrix), Topology(64, 8)
    problem = QuotaProblem.of(placement, topology, CPU)
    quota, _ = exact_quota(torch.from_numpy(counts), problem, order)
    assert np.array_equal(quota.numpy(), host.exact_quota(counts, placement, topology))


def test_no_tokens_one_device_and_very_many_tokens() -> None:
    for counts, placement, topology in (
        (np.zeros((4, 3)), Placement(np.ones((3, 4))), Topology(4, 2)),
        (np.full((1, 5), 7), Placement(np.ones((5, 1))), Topology(1, 1)),
        (np.array([[2**40 - 1, 0], [0, 1]]), Placement([[True, True], [False, True]]), Topology(2, 1)),
    ):
        whole = counts.astype(np.int64)
        quota, _ = exact_quota(torch.from_numpy(whole), QuotaProblem.of(placement, topology, CPU))
        assert np.array_equal(quota.numpy(), host.exact_quota(whole, placement, topology))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="expert 1 has no holder"):
        QuotaProblem.of(Placement([[True, False], [False, False]]), Topology(2, 2), CPU)
    with pytest.raises(ValueError, match="placement has 2 devices, topology 4"):
        QuotaProblem.of(Placement(np.eye(2)), Topology(4, 2), CPU)
    problem = QuotaProblem.of(Placement(np.eye(2)), Topology(2, 2), CPU)
    with pytest.raises(ValueError, match=r"counts torch.int32 \(2, 2\), must be contiguous torch.int64 \(2, 2\)"):
        exact_quota(torch.zeros(2, 2, dtype=torch.int32), problem)
