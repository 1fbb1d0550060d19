"""The tables of a dispatch bring every row to a holder of its expert, sorted by expert and source."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecate._native import arrival_table, direct_tables, rows_within_nodes
from hecate.ops.permute import block_order
from hecate.placement import Placement, Topology
from hecate.planning.plan import Plan
from hecate.planning.quota import exact_quota

EXPERTS = 10


def random_plan(seed: int, devices: int) -> Plan:
    rng = np.random.default_rng([seed, devices])
    counts = rng.integers(0, 4, (devices, EXPERTS))
    counts[rng.integers(devices)] = 0
    owners = rng.integers(0, devices, EXPERTS)
    placement = Placement.from_owners(owners, devices) | Placement(rng.random((EXPERTS, devices)) < 0.2)
    topology = Topology(devices, 2 if devices % 2 == 0 else 1)
    return Plan.build(placement, owners, topology, exact_quota(counts, placement, topology))


def local_rows(plan: Plan, rank: int) -> list[int]:
    """Owned experts first, as in `LayerCopies`."""
    held = plan.placement.held_by(rank).tolist()
    return sorted(held, key=lambda expert: (plan.owners[expert] != rank, expert))


def reordered(rows: list, table: np.ndarray) -> list:
    order = block_order(torch.from_numpy(table.copy()).view(2, -1), int(table[len(table) // 2 :].sum()))
    assert sorted(order.tolist()) == list(range(len(rows)))
    return [rows[i] for i in order.tolist()]


@pytest.mark.parametrize("devices", [1, 2, 5, 6])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_arrives_in_order(seed: int, devices: int) -> None:
    plan = random_plan(seed, devices)
    tables = [direct_tables(plan.holders, plan.quota, rank, local_rows(plan, rank)) for rank in range(devices)]
    parcels: dict[tuple[int, int], list] = {}
    for rank, (table, leaving, sent, _, _) in enumerate(tables):
        # A row is (source, expert, number); sorted by expert, rows of a pair are consecutive.
        rows = [(rank, int(e), i) for e, n in enumerate(plan.counts[rank]) for i in range(n)]
        rows = reordered(rows, table[: 2 * leaving])
        for device, amount in enumerate(sent):
            parcels[rank, device], rows = rows[:amount], rows[amount:]
        assert not rows
    for rank, (table, leaving, _, received, sizes) in enumerate(tables):
        assert received == tuple(len(parcels[source, rank]) for source in range(devices))
        rows = [row for source in range(devices) for row in parcels[source, rank]]
        if len(table) > 2 * leaving:
            rows = reordered(rows, table[2 * leaving :])
        experts = [e for e, n in zip(local_rows(plan, rank), sizes, strict=True) for _ in range(n)]
        assert [row[1] for row in rows] == experts
        of_pair = dict(zip(map(tuple, plan.holders.tolist()), plan.quota.T, strict=True))
        wanted = [s for e in local_rows(plan, rank) for s in np.repeat(np.arange(devices), of_pair[e, rank])]
        assert [row[0] for row in rows] == wanted
    everything = [row for parcel in parcels.values() for row in parcel]
    assert len(set(everything)) == len(everything) == plan.counts.sum()


def test_one_device_or_one_expert_needs_no_second_order() -> None:
    plan = random_plan(0, 1)
    table, leaving, *_ = direct_tables(plan.holders, plan.quota, 0, local_rows(plan, 0))
    assert len(table) == 2 * leaving
    placement = Placement.even(4, 4)
    topology = Topology(4, 4)
    single = Plan.build(placement, placement.owners, topology, exact_quota(np.full((4, 4), 3), placement, topology))
    table, leaving, *_ = direct_tables(single.holders, single.quota, 2, [2])
    assert len(table) == 2 * leaving


def test_locality_and_relays() -> None:
    plan = random_plan(1, 6)
    node = plan.holders[:, 1] // 2
    within = sum(int(plan.quota[s][node == s // 2].sum()) for s in range(6))
    assert rows_within_nodes(plan.holders, plan.quota, 2) == (plan.counts.sum(), within)
    _, received, sizes = arrival_table(plan.holders, plan.quota[:2].copy(), 3, local_rows(plan, 3))
    assert received == tuple(plan.quota[:2, plan.holders[:, 1] == 3].sum(axis=1))
    assert sum(sizes) == sum(received)


def test_an_expert_that_is_not_held_is_refused() -> None:
    plan = random_plan(0, 2)
    held = local_rows(plan, 0)
    with pytest.raises(
        ValueError, match=f"the plan has {len(held)} experts on device 0, of which only {len(held) - 1}"
    ):
        direct_tables(plan.holders, plan.quota, 0, held[1:])
