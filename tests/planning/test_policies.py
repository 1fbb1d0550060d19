"""Every policy, in the order in which the engine calls it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from hecate.config import PolicyName
from hecate.cost import CostModel
from hecate.loads.synthetic import synthetic_loads
from hecate.placement import Placement, Topology, initial_owners
from hecate.policies import get_policy
from tests.planning.oracles import placed_counts, setting

NAMES = get_args(PolicyName)


@pytest.mark.parametrize("calibrate", ["pays", "always", False])
@pytest.mark.parametrize("overlap", ["auto", 0, 3])
@pytest.mark.parametrize("devices", [(1, 1), (2, 2), (8, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_calls(name: str, devices: tuple[int, int], overlap: Any, calibrate: Any) -> None:
    topology = Topology(*devices)
    layer = setting(topology, overlap_degree=overlap, calibrate=calibrate)
    policy, owners = get_policy(name), initial_owners(12, topology.num_devices)
    loads = synthetic_loads("drift", topology.num_devices, 12, 128, 2, seed=0, steps=6)
    start = Placement.from_owners(owners, topology.num_devices)
    assert policy.materialize(layer, loads[:0], owners) == start
    ahead = policy.materialize(layer, loads[:5], owners)
    more = policy.calibrate(layer, loads[5], owners, ahead)
    assert start <= ahead <= more
    assert (more - start).matrix.sum(axis=0).max() <= layer.memory_slots
    plan = policy.assign(layer, loads[5], owners, more)
    assert plan.placement == more
    assert (placed_counts(plan.quota, more) == loads[5]).all()
    assert plan.bytes == plan.copies * 2**21
    assert 1 <= plan.lower_bound <= plan.imbalance
    second = initial_owners(12, topology.num_devices, 12)
    new = policy.reshard([layer, layer], [loads[5].sum(axis=0)] * 2, [owners, second])
    owned = sum(np.bincount(owner, minlength=topology.num_devices) for owner in new)
    assert owned.max() <= -(-24 // topology.num_devices)


def test_balanced_beats_the_paper_beats_ep() -> None:
    topology, left = Topology(8, 8), {}
    loads = synthetic_loads("drift", 8, 32, 512, 2, seed=3, steps=6)
    owners = initial_owners(32, 8)
    for name in NAMES:
        policy, layer = get_policy(name), setting(topology, overlap_degree=4, calibrate=False)
        placement = policy.materialize(layer, loads[:5], owners)
        left[name] = policy.assign(layer, loads[5], owners, placement).imbalance
    assert left["balanced"] <= 1.01 < left["hecate"] < left["ep"]


def test_where_nothing_is_hidden_copies_wait_for_the_gate_and_must_pay() -> None:
    topology, owners = Topology(2, 2), initial_owners(8, 2)
    counts = np.zeros((2, 8), dtype=np.int64)
    counts[:, 0] = 4000
    history, policy = counts[None], get_policy("balanced")
    slow = replace(CostModel.cpu(), message_ns=10**12)
    for model, copies in ((CostModel.cpu(), 1), (slow, 0)):
        layer = setting(topology, model)
        start = Placement.from_owners(owners, 2)
        assert policy.materialize(layer, history, owners) == start
        assert (policy.calibrate(layer, counts, owners, start) - start).matrix.sum() == copies
        never = replace(layer, calibrate=False)
        assert (policy.materialize(never, history, owners) - start).matrix.sum() == copies
    always = policy.calibrate(setting(topology, slow, calibrate="always"), counts, owners, start)
    assert policy.assign(setting(topology), counts, owners, always).imbalance <= 1.02


@pytest.mark.parametrize("share", [0, 499, 500, 800])
def test_copies_are_made_early_if_at_least_half_of_their_time_is_hidden(share: int) -> None:
    topology, owners, policy = Topology(8, 4), initial_owners(32, 8), get_policy("balanced")
    loads = synthetic_loads("drift", 8, 32, 512, 2, seed=3, steps=6)
    layer = setting(topology, CostModel(flops=10**10, hidden_permille=share))
    start = Placement.from_owners(owners, 8)
    early = policy.materialize(layer, loads[:5], owners)
    configured = policy.materialize(replace(layer, overlap_degree=2), loads[:5], owners)
    without = policy.materialize(replace(layer, calibrate=False), loads[:5], owners)
    fewest = policy.calibrate(layer, loads[5], owners, start)
    copies = [int((placement - start).matrix.sum()) for placement in (early, configured, without, fewest)]
    assert (copies[0] > 0) == (share >= 500)
    assert min(copies[1:]) > 0
    assert share < 500 or copies[3] < copies[0]


def test_unknown_policies_are_named() -> None:
    with pytest.raises(ValueError, match="policy='best': must be one of 'balanced', 'hecate', 'ep'"):
        get_policy("best")
