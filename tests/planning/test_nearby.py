"""Copies that keep tokens in their node, and the times that policies weigh them by."""

from dataclasses import replace

import numpy as np
import pytest

from hecate.cost import CostModel, LayerCost
from hecate.loads.synthetic import synthetic_loads
from hecate.placement import Placement, Topology, initial_owners
from hecate.planning.limits import CopyLimits
from hecate.planning.materialize import robust_copies
from hecate.planning.nearby import NodeCopies, nearby_copies
from hecate.planning.plan import added
from hecate.planning.quota import exact_pairs, min_max_loads, sent_rows
from hecate.planning.times import copies_ns, layer_ns
from hecate.policies import get_policy
from hecate.policies.base import LayerSetting, node_entries
from tests.planning.oracles import random_case

COST = LayerCost(CostModel(message_ns=0), 10**6, 10**6, 10**6, 1000, 10**9)  # a copy takes as many bytes as 500 tokens


@pytest.mark.parametrize("seed", range(30))
def test_each_node_gets_the_foreign_experts_that_it_sends_most_tokens_to(seed: int) -> None:
    counts, owners, _, topology = random_case(seed)
    per_node, free, price = seed % 5, seed % 3, 6
    placement = nearby_copies(counts, owners, topology, per_node, free=free, price=price)
    copies = added(placement, Placement.from_owners(owners, topology.num_devices))
    sent = counts.reshape(topology.num_nodes, topology.devices_per_node, -1).sum(axis=1)
    for node in range(topology.num_nodes):
        foreign = np.flatnonzero((owners // topology.devices_per_node != node) & (sent[node] > 0))
        hottest = sorted(foreign, key=lambda e: (-sent[node, e], e))
        wanted = [e for rank, e in enumerate(hottest) if rank < free or sent[node, e] >= price][:per_node]
        inside = copies[copies[:, 1] // topology.devices_per_node == node]
        assert sorted(inside[:, 0]) == sorted(wanted)
        each = np.bincount(inside[:, 1] % topology.devices_per_node, minlength=topology.devices_per_node)
        assert each.max() <= -(-per_node // topology.devices_per_node)


@pytest.mark.parametrize("seed", range(20))
def test_robust_copies_keep_given_ones_and_the_limits_of_further_ones(seed: int) -> None:
    counts, owners, _, topology = random_case(seed)
    start = nearby_copies(counts, owners, topology, 2, free=2, price=1)
    held = start.matrix.reshape(len(owners), topology.num_nodes, -1).any(axis=2)
    limits = CopyLimits.of(topology, 1 + seed % 2, 1)
    placement = robust_copies(counts[None], owners, topology, limits, start=start)
    assert start <= placement
    assert (placement - start).matrix.sum(axis=0).max() <= 1 + seed % 2
    nodes = placement.matrix.reshape(len(owners), topology.num_nodes, -1).any(axis=2)
    assert (nodes & ~held).sum(axis=0).max() <= 1


def test_without_free_slots_the_given_copies_stay() -> None:
    counts, owners, _, topology = random_case(3)
    start = nearby_copies(counts, owners, topology, 4, free=4, price=1)
    assert robust_copies(counts[None], owners, topology, CopyLimits.of(topology, 0), start=start) is start


def test_an_expert_leaves_its_owner_once_and_enters_each_node_once() -> None:
    topology, owners = Topology(8, 4), np.array([0, 1, 4])
    near, far = COST.model.transfer_ns(2 * 10**6, False), COST.model.transfer_ns(2 * 10**6, True)

    def ns(*copies: tuple[int, int]) -> int:
        return copies_ns(COST, np.array(copies, dtype=np.int64).reshape(-1, 2), owners, topology)

    assert ns() == 0
    assert ns((0, 1)) == ns((0, 1), (0, 2), (0, 3)) == pytest.approx(near, abs=1)
    assert ns((0, 4)) == ns((0, 4), (0, 5), (0, 6), (0, 1)) == pytest.approx(far, abs=1)
    assert ns((0, 4), (1, 4)) == pytest.approx(2 * far, abs=1)  # one device receives both
    assert ns((0, 5), (1, 4), (2, 0)) == pytest.approx(far, abs=1)


def test_a_layer_takes_as_long_as_its_busiest_device_and_link() -> None:
    topology, owners = Topology(4, 2), np.array([0, 2])
    counts = np.array([[10, 30], [0, 20], [5, 7], [0, 0]])
    owned = Placement.from_owners(owners, 4)
    border = COST.model.transfer_ns(4 * 50 * COST.token_bytes, True)  # 50 tokens enter device 2, 5 leave it
    assert layer_ns(COST, counts, owned, topology, 57) == COST.token_ns(57) + border
    everywhere = Placement(np.ones((2, 4), dtype=bool))
    assert layer_ns(COST, np.full((4, 2), 5), everywhere, topology, 10) == COST.token_ns(10)


def setting(topology: Topology, cost: LayerCost) -> LayerSetting:
    return LayerSetting(topology, cost, 2, 1.02, "auto", "pays", 4096)


def crossing(placement: Placement, counts: np.ndarray, topology: Topology) -> int:
    rows = sent_rows(*exact_pairs(counts, placement, topology), topology.num_devices)
    nodes = np.arange(topology.num_devices) // topology.devices_per_node
    return int(rows[nodes[:, None] != nodes].sum())


def test_hidden_copies_keep_tokens_in_their_node_and_devices_balanced() -> None:
    topology, owners = Topology(16, 4), initial_owners(32, 16)
    layer, tokens, balance = setting(topology, replace(COST, token_flops=10**8, dense_token_flops=3 * 10**6)), [], []
    assert node_entries(layer) == 4
    loads = synthetic_loads("drift", 16, 32, 1024, 2, 0, steps=12, drift_rate=0.1, step_noise=0.15)
    for step in range(5, 12):
        past, counts = loads[step - 5 : step], loads[step]
        placement = get_policy("balanced").materialize(layer, past, owners)
        robust = robust_copies(past, owners, topology, CopyLimits.of(topology, 2, 4))
        assert (placement.matrix.sum(axis=0) - np.bincount(owners, minlength=16)).max() <= 2
        tokens.append(crossing(placement, counts, topology) / crossing(robust, counts, topology))
        balance.append(min_max_loads(counts.sum(axis=0)[None], placement)[0] * 16 / counts.sum())
    assert np.mean(tokens) < 0.8
    assert np.mean(balance) < 1.05


def test_slots_go_to_balance_if_that_saves_more() -> None:
    """One expert gets nearly all tokens: it needs every slot of its node; keeping others at home would cost balance."""
    topology, owners = Topology(8, 4), initial_owners(8, 8)
    counts = np.full((8, 8), 2)
    counts[:, 0] = 1000
    cost = replace(COST, token_flops=10**10)
    found = NodeCopies(np.stack([counts] * 3), owners, topology, cost, 1, 8, int(counts.sum() // 8)).best()
    assert found.matrix[0].all()


def test_no_copies_where_no_past_step_needed_any() -> None:
    owners, policy = initial_owners(8, 4), get_policy("balanced")
    layer = setting(Topology(4, 4), replace(COST, dense_token_flops=10**8))
    even = np.full((5, 4, 8), 100)
    assert policy.materialize(layer, even, owners) == Placement.from_owners(owners, 4)
    even[2, :, 0] += 50
    assert policy.materialize(layer, even, owners) != Placement.from_owners(owners, 4)
