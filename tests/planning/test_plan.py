"""`hecate.plan`: its guarantees for any input, how few copies it needs, and invalid arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hecate
from hecate.loads.synthetic import synthetic_loads
from hecate.placement import Placement, Topology, initial_owners
from hecate.planning.limits import LinkBudget
from hecate.planning.plan import Plan
from tests.planning.oracles import fewest_copies, least_load, pair_loads, placed_counts, random_case


def check(plan: Plan, counts: np.ndarray, owners: np.ndarray, slots: int) -> None:
    topology = plan.topology
    assert (placed_counts(plan.quota, plan.placement) == counts).all()
    assert (plan.counts == counts).all()
    assert (pair_loads(plan.quota, plan.placement) == plan.device_loads).all()
    assert (plan.holders == np.argwhere(plan.placement.matrix)).all()
    start = Placement.from_owners(owners, topology.num_devices)
    assert start <= plan.placement
    copies = (plan.placement - start).matrix
    assert copies.sum(axis=0).max() <= slots
    assert plan.copies == copies.sum()
    foreign = {
        (e, topology.node_of(d)) for e, d in np.argwhere(copies) if topology.node_of(d) != topology.node_of(owners[e])
    }
    assert plan.crossings == len(foreign)
    assert plan.imbalance >= plan.lower_bound - 1e-9


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from(["copies", "crossings"]), st.booleans())
def test_any_plan_is_valid(seed: int, slots: int, prefer: Any, ahead: bool) -> None:
    counts, owners, _, topology = random_case(seed)
    history = np.stack([counts, counts[::-1]]) if ahead else None
    plan = hecate.plan(counts, owners, topology, memory_slots=slots, max_imbalance=1.02, prefer=prefer, history=history)
    check(plan, counts, owners, slots)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2), st.booleans())
def test_limits_on_links_hold(seed: int, foreign: int, ahead: bool) -> None:
    counts, owners, _, topology = random_case(seed)
    budget = LinkBudget(device_in=2 * 7 + 3, device_out=7, node_in=3 * 7, node_out=2 * 7)
    plan = hecate.plan(
        counts, owners, topology, memory_slots=3, max_imbalance=1.0, history=counts[None] if ahead else None,
        foreign_slots=foreign, byte_budget=budget, expert_bytes=7,
    )  # fmt: skip
    check(plan, counts, owners, 2)
    entered = np.zeros(topology.num_nodes)
    for e in range(len(owners)):
        for node in {topology.node_of(d) for d in plan.placement.holders_of(e)} - {topology.node_of(owners[e])}:
            entered[node] += 1
    assert entered.max() <= foreign
    # One send a device: as many copies as devices at most.
    assert plan.copies <= topology.num_devices
    assert plan.bytes == 7 * plan.copies


@pytest.mark.parametrize("seed", range(25))
def test_small_cases_need_at_most_one_copy_more_than_the_fewest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, experts = 3, int(rng.integers(3, 6))
    loads = rng.integers(0, 100, experts) * rng.integers(1, 8, experts)
    counts = np.zeros((devices, experts), dtype=np.int64)
    counts[0] = loads
    owners = initial_owners(experts, devices)
    target = int(loads.sum() * 1.1 / devices)
    fewest = fewest_copies(loads, owners, devices, 2, target)
    plan = hecate.plan(counts, owners, Topology(devices, devices), memory_slots=2, max_imbalance=1.1)
    if fewest is not None and plan.device_loads.max() <= max(target, -(-int(loads.sum()) // devices)):
        assert plan.copies <= fewest + 1
    else:
        assert plan.device_loads.max() <= max(target, least_load(loads, Placement.from_owners(owners, devices), 2))


@pytest.mark.parametrize("slots", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_lower_bound_is_one(seed: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    loads = rng.integers(0, 100, 4) * rng.integers(1, 10, 4)
    counts, owners = np.stack([loads, 0 * loads, 0 * loads]), np.array([0, 0, 1, 2])
    plan = hecate.plan(counts, owners, Topology(3, 3), memory_slots=slots, max_imbalance=1.0)
    if loads.sum():
        assert plan.lower_bound <= least_load(loads, Placement.from_owners(owners, 3), slots) * 3 / loads.sum()


def test_few_copies_and_crossings_at_scale() -> None:
    counts = synthetic_loads("zipf", 64, 256, 256, 8, seed=0, exponent=1.2)[0]
    owners, topology = initial_owners(256, 64), Topology(64, 8)
    few = hecate.plan(counts, owners, topology, memory_slots=2, max_imbalance=1.01)
    local = hecate.plan(counts, owners, topology, memory_slots=4, max_imbalance=1.01, prefer="crossings")
    assert few.imbalance <= 1.01
    assert few.copies <= 52
    assert local.imbalance <= 1.01
    assert local.crossings <= 8
    assert local.copies <= 64


def test_out_of_reach_of_the_dial_the_record_says_so() -> None:
    counts = np.zeros((8, 8), dtype=np.int64)
    counts[:, 0] = 100
    plan = hecate.plan(counts, np.arange(8), Topology(8, 8), memory_slots=0, max_imbalance=1.01)
    assert plan.imbalance == plan.lower_bound == 8.0
    assert plan.copies == 0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("devices", "experts"), [(1, 1), (1, 5), (4, 1), (4, 4), (8, 3)])
def test_no_tokens_one_device_one_expert(devices: int, experts: int, ahead: bool) -> None:
    owners = initial_owners(experts, devices)
    for tokens in (0, 5):
        counts = np.full((devices, experts), tokens)
        history = counts[None] if ahead else None
        plan = hecate.plan(
            counts, owners, Topology(devices, devices), memory_slots=2, max_imbalance=1.0, history=history
        )
        check(plan, counts, owners, 2)
    assert hecate.plan(0 * counts, owners, Topology(devices, devices), memory_slots=0, max_imbalance=1).imbalance == 1


def test_a_dial_that_asks_for_nothing() -> None:
    counts = np.array([[2**39, 1], [2**39 - 2, 1]])
    plan = hecate.plan(counts, np.array([0, 1]), Topology(2, 2), memory_slots=1, max_imbalance=2.0**29)
    assert plan.copies == 0


def test_two_to_the_40_tokens() -> None:
    counts = np.zeros((8, 16), dtype=np.int64)
    counts[:, 3] = 2**37
    for history in (None, counts[None]):
        plan = hecate.plan(
            counts, np.arange(16) // 2, Topology(8, 4), memory_slots=1, max_imbalance=1.0, history=history
        )
        assert (plan.device_loads == 2**37).all()


def test_history_alone_decides_the_copies() -> None:
    history = synthetic_loads("drift", 8, 16, 64, 2, seed=1, steps=3)
    topology, owners = Topology(8, 4), initial_owners(16, 8)
    first, second = (
        hecate.plan(counts, owners, topology, memory_slots=2, max_imbalance=1.0, history=history)
        for counts in (history[0], history[1] * 0 + 7)
    )
    assert first.placement == second.placement
    assert first.digest() != second.digest()


VALID: dict[str, Any] = {"counts": np.ones((2, 4), dtype=np.int64), "owners": [0, 0, 1, 1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": -np.ones((2, 4), dtype=np.int64)}, "-1 tokens of device 0 for expert 0, must be >= 0"),
        ({"counts": np.ones((2, 3), dtype=np.int64)}, r"shape \(2, 3\).*num_experts=4"),
        ({"counts": np.full((2, 4), 2**39)}, r"4398046511104 tokens in total, must be <= 2\*\*40"),
        ({"owners": [0, 0, 1, 2]}, r"expert 3 has owner 2, must be a device in \[0, 2\)"),
        ({"owners": [0, -1, 1, 1]}, r"expert 1 has owner -1"),
        ({"memory_slots": -1}, "memory_slots=-1: must be an integer >= 0"),
        ({"memory_slots": 1.5}, "memory_slots=1.5: must be an integer"),
        ({"max_imbalance": 0.99}, "max_imbalance=0.99: must be a number >= 1"),
        ({"max_imbalance": float("nan")}, "max_imbalance=nan: must be a number >= 1"),
        ({"prefer": "speed"}, "prefer='speed': must be one of 'copies', 'crossings'"),
        ({"foreign_slots": -2}, "foreign_slots=-2: must be an integer >= 0"),
        ({"expert_bytes": 0}, "expert_bytes=0: must be an integer >= 1"),
        ({"history": np.ones((2, 4))}, r"history: shape \(2, 4\), must be \[steps, num_devices=2, num_experts=4\]"),
        ({"history": -np.ones((1, 2, 4), dtype=np.int64)}, "must be >= 0"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    arguments = VALID | {"topology": Topology(2, 2), "memory_slots": 1, "max_imbalance": 1.02} | changes
    with pytest.raises(ValueError, match=message):
        hecate.plan(**arguments)


def test_a_topology_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match="num_devices=6 must be a multiple of devices_per_node=4"):
        Topology(6, 4)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_bad_budgets_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"LinkBudget.node_in=.*must be an integer >= 0"):
        LinkBudget(node_in=value)


def record(**changes: Any) -> Plan:
    fields = {
        "placement": Placement([[1, 1], [0, 1]]), "owners": np.array([0, 1]), "topology": Topology(2, 2),
        "holders": np.array([[0, 0], [0, 1], [1, 1]]), "quota": np.array([[1, 2, 3], [4, 5, 6]]),
    }  # fmt: skip
    return Plan(**(fields | changes))


def test_the_record_is_frozen() -> None:
    plan = record()
    assert plan.counts.tolist() == [[3, 3], [9, 6]]
    assert (plan.device_loads.tolist(), plan.copies, plan.crossings, plan.bytes) == ([5, 16], 1, 0, 1)
    with pytest.raises(AttributeError):
        plan.copies = 2  # type: ignore[misc]
    for array in (plan.quota, plan.holders, plan.device_loads, plan.owners):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"owners": np.array([0, 0])}, "owner 0 of expert 1 does not hold it"),
        ({"owners": np.array([0])}, r"owners has shape \(1,\), must be \(2,\)"),
        ({"holders": np.array([[0, 1], [0, 0], [1, 1]])}, r"holder \(0, 0\) is out of order"),
        ({"holders": np.array([[0, 0], [1, 0], [1, 1]])}, r"holder \(1, 0\) is not in placement"),
        ({"placement": Placement([[1, 1], [1, 1]])}, "3 holders, placement has another number"),
        ({"quota": np.array([[1, 2, 3], [4, 5, -6]])}, "quota has -6, must be >= 0"),
        ({"quota": np.ones((2, 2))}, r"quota has shape \(2, 2\), must be \(2, 3\)"),
        ({"topology": Topology(4, 2)}, "placement has 2 devices, topology 4"),
    ],
)
def test_the_record_validates_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(**changes).validate()
