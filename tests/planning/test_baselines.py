"""The policies to compare with, against slow versions of what their papers say."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.config import FSSDPConfig
from hecate.cost import CostModel
from hecate.placement import Placement, Topology
from hecate.planning.calibrate import target_load
from hecate.policies import LayerSetting, get_policy
from hecate.policies.smartmoe import exchanged
from tests.planning.oracles import Int64, pair_loads, random_case, setting

LINKS = CostModel(
    intra_node_bandwidth=10**12, inter_node_bandwidth=10**11, message_ns=1000, flops=10**12, hidden_permille=0
)
SEEDS = st.integers(0, 10**6)


def own(owners: Int64, topology: Topology) -> Placement:
    return Placement.from_owners(owners, topology.num_devices)


def predicted_ns(layer: LayerSetting, counts: Int64, owners: Int64, everywhere: set[int]) -> int:
    """FasterMoE's prediction, token by token: experts in `everywhere` are computed where the tokens are."""
    devices = len(counts)
    computed, sent, received = [0] * devices, [0] * devices, [0] * devices
    for device in range(devices):
        for expert, tokens in enumerate(counts[device].tolist()):
            target = device if expert in everywhere else int(owners[expert])
            computed[target] += tokens
            if target != device:
                sent[device] += tokens
                received[target] += tokens
    cost, model, crosses = layer.cost, layer.cost.model, layer.topology.num_nodes > 1
    exchange = model.transfer_ns(max(sent + received) * cost.token_bytes, crosses)
    copy = model.transfer_ns(cost.expert_bytes, crosses) + model.transfer_ns(cost.gradient_bytes, crosses)
    return cost.token_ns(max(computed)) + 4 * exchange + len(everywhere) * copy


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, slots=st.integers(0, 5))
def test_fastermoe_copies_the_hottest_as_long_as_its_prediction_says(seed: int, slots: int) -> None:
    counts, owners, _, topology = random_case(seed)
    layer = setting(topology, LINKS, memory_slots=slots)
    found = get_policy("fastermoe").calibrate(layer, counts, owners, own(owners, topology))
    hottest = sorted(range(len(owners)), key=lambda e: (-int(counts[:, e].sum()), e))[:slots]
    hottest = [e for e in hottest if counts[:, e].any()]
    times = [predicted_ns(layer, counts, owners, set(hottest[:r])) for r in range(len(hottest) + 1)]
    expected = own(owners, topology).matrix.copy()
    expected[hottest[: times.index(min(times))]] = True
    assert found == Placement(expected)


def test_fastermoe_copies_when_it_pays_and_as_much_as_it_can_when_asked() -> None:
    topology, owners = Topology(4, 2), np.arange(4)
    counts = np.full((4, 4), 10)
    counts[:, 1] = 4000
    policy = get_policy("fastermoe")
    slow = replace(LINKS, message_ns=10**12)
    for model, calibrate, copied in ((LINKS, "pays", 1), (slow, "pays", 0), (slow, "always", 2), (LINKS, False, 0)):
        layer = setting(topology, model, calibrate=calibrate)
        placement = policy.calibrate(layer, counts, owners, own(owners, topology))
        assert (placement.matrix.sum(axis=1) == 4).sum() == copied
    plan = policy.assign(layer, counts, owners, Placement(np.ones((4, 4))))
    assert plan.device_loads.tolist() == counts.sum(axis=1).tolist()  # every token stays where it is


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_smartmoe_gives_the_hottest_expert_left_to_the_least_loaded_device_with_room(seed: int) -> None:
    counts, owners, _, topology = random_case(seed)
    loads, devices = counts.sum(axis=0), topology.num_devices
    room = [int((owners == d).sum()) for d in range(devices)]
    carried, chosen = [0] * devices, owners.tolist()
    for expert in sorted(range(len(owners)), key=lambda e: (-int(loads[e]), e)):
        rank = {d: (carried[d], d != owners[expert], d) for d in range(devices) if room[d]}
        device = min(rank, key=rank.__getitem__)
        chosen[expert], room[device] = device, room[device] - 1
        carried[device] += int(loads[expert])
    before = max(int(loads[owners == d].sum()) for d in range(devices))
    found = exchanged(loads, owners, devices)
    assert found.tolist() == (chosen if max(carried) < before else owners.tolist())
    assert (np.bincount(found, minlength=devices) == np.bincount(owners, minlength=devices)).all()


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_smartmoe_is_between_the_best_exchange_and_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loads, owners = rng.integers(0, 100, 6), np.arange(6) // 2
    busiest = [max(loads[np.array(o) == d].sum() for d in range(3)) for o in set(permutations(owners.tolist()))]
    found = exchanged(loads, owners, 3)
    left = max(loads[found == d].sum() for d in range(3))
    assert min(busiest) <= left <= max(loads[owners == d].sum() for d in range(3))
    assert left <= 4 / 3 * min(busiest) + 1e-9 or left == max(loads[owners == d].sum() for d in range(3))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, slots=st.sampled_from([0, 1, 2, 16]))
def test_exact_reaches_the_dial_with_copies_for_the_true_loads_whatever_they_cost(seed: int, slots: int) -> None:
    counts, owners, _, topology = random_case(seed)
    never_pays = replace(LINKS, intra_node_bandwidth=1, inter_node_bandwidth=1)
    layer, policy = setting(topology, never_pays, memory_slots=slots), get_policy("exact")
    start = policy.materialize(layer, counts[None], owners)
    assert start == own(owners, topology)
    placement = policy.calibrate(layer, counts, owners, start)
    plan = policy.assign(layer, counts, owners, placement)
    assert plan.device_loads.tolist() == pair_loads(plan.quota, placement).tolist()
    before = policy.assign(layer, counts, owners, start)
    assert plan.device_loads.max() <= before.device_loads.max()
    if slots == 16:  # at least as many as there are experts, so that the dial can be reached
        target = target_load(int(counts.sum()), topology.num_devices, 1_020_000)
        assert plan.device_loads.max() <= target
    assert (placement - start).matrix.sum(axis=0).max() <= slots


def divided(loads: Int64, placement: Placement) -> list[float]:
    """Device loads if each expert's tokens are divided evenly among its holders."""
    found = [0.0] * placement.num_devices
    for expert, load in enumerate(loads.tolist()):
        holders = placement.holders_of(expert).tolist()
        for device in holders:
            found[device] += load / len(holders)
    return found


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, slots=st.integers(0, 4))
def test_flexmoe_keeps_what_lowers_the_largest_load_and_lets_go_of_the_rest(seed: int, slots: int) -> None:
    counts, owners, _, topology = random_case(seed)
    layer, policy = setting(topology, LINKS, memory_slots=slots, max_imbalance=1.0), get_policy("flexmoe")
    start = own(owners, topology)
    assert policy.materialize(layer, counts[None], owners) == policy.calibrate(layer, counts, owners, start) == start
    assert [o.tolist() for o in policy.reshard([layer], [counts.sum(axis=0)], [owners])] == [owners.tolist()]
    kept, loads = start, counts.sum(axis=0)
    for now in (loads, loads[::-1].copy()):
        before, kept = kept, policy.keep(layer, now, owners, kept)
        assert start <= kept
        assert (kept - start).matrix.sum(axis=0).max() <= slots
        good = target_load(int(now.sum()), topology.num_devices, 1_000_000)
        most = max(*divided(now, kept), good)
        assert most <= max(*divided(now, before), good) + 1e-3  # shares are rounded to 1e-6 tokens
        for expert, device in zip(*(kept - start).matrix.nonzero(), strict=True):  # none is needless
            fewer = kept.matrix.copy()
            fewer[expert, device] = False
            assert max(divided(now, Placement(fewer))) > most - 1e-3


def test_flexmoe_copies_the_hottest_expert_until_the_dial_is_reached() -> None:
    owners, loads, topology = np.arange(4), np.array([700, 100, 100, 100]), Topology(4, 4)
    policy, start = get_policy("flexmoe"), own(np.arange(4), topology)
    layer = setting(topology, memory_slots=1, max_imbalance=1.1)
    kept = policy.keep(layer, loads, owners, start)
    assert kept.matrix.sum(axis=1).tolist() == [4, 1, 1, 1]
    assert policy.keep(layer, np.full(4, 250), owners, kept) == start  # removed: nothing needs them
    moved = policy.keep(layer, loads[::-1].copy(), owners, kept)
    assert moved.matrix.sum(axis=1).tolist() == [1, 1, 1, 4]
    nearly = policy.keep(replace(layer, max_imbalance=1.5), loads, owners, start)
    assert nearly.matrix.sum(axis=1).tolist() == [3, 1, 1, 1]  # 333, 333, 333 with 100 more: 333 <= 1.5 * 250 - 42


def test_a_policy_that_its_settings_leave_nothing_to_do_is_refused() -> None:
    for policy in ("fastermoe", "exact"):
        with pytest.raises(ValueError, match=f"policy='{policy}' copies experts only after the gate, but"):
            FSSDPConfig(policy=policy, calibrate=False)
    for changes in ({"reshard_interval": 0}, {"reshard_interval": 5, "memory_slots": 0}):
        with pytest.raises(ValueError, match=r"policy='flexmoe' changes which copies there are every .*at least 1"):
            FSSDPConfig(policy="flexmoe", **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"policy='smartmoe' only changes owners, .* reshard_interval=0 means never"):
        FSSDPConfig(policy="smartmoe")
