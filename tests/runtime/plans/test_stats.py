"""What `FSSDP.stats()` reports about plans: imbalance, the least possible imbalance, and what limits it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hecate.cost import CostModel, LayerCost
from hecate.placement import Placement, Topology
from hecate.planning.plan import Calibration, Plan
from hecate.planning.quota import exact_quota
from hecate.policies import get_policy
from hecate.policies.base import LayerSetting
from hecate.runtime.plans.reasons import why_no_copies
from hecate.runtime.plans.stats import LayerTotals

TOPOLOGY = Topology(4, devices_per_node=2)
OWNERS = np.array([0, 1, 2, 3])
COST = LayerCost(CostModel(), expert_bytes=1, gradient_bytes=1, token_flops=1, token_bytes=1, dense_token_flops=1)
SETTING = LayerSetting(TOPOLOGY, COST, 1, 1.0, "auto", "always", 4)


def plan_of(loads: list[int], copies: list[tuple[int, int]]) -> Plan:
    """A plan in which every device routes the same counts; `copies` are (expert, device) pairs."""
    matrix = Placement.from_owners(OWNERS, 4).matrix.copy()
    for expert, device in copies:
        matrix[expert, device] = True
    placement, counts = Placement(matrix), np.tile(np.array(loads, dtype=np.int64) // 4, (4, 1))
    return Plan.build(placement, OWNERS, TOPOLOGY, exact_quota(counts, placement, TOPOLOGY))


def entry(plan: Plan, setting: LayerSetting = SETTING) -> dict[str, object]:
    totals = LayerTotals(np.zeros((4, 4), dtype=np.int64))
    totals.add(plan.counts, plan, top_k=1)
    return totals.report("layer", setting)


def test_before_the_first_micro_batch() -> None:
    report = LayerTotals(np.zeros((4, 4), dtype=np.int64)).report("layer", SETTING)
    assert (report["lower_bound"], report["limited_by"], report["crossings"]) == (1.0, None, 0)


def test_even_loads_are_limited_by_nothing() -> None:
    report = entry(plan_of([16, 16, 16, 16], []))
    assert (report["lower_bound"], report["limited_by"], report["imbalance_after"]) == (1.0, None, 1.0)


def test_crossings_are_nodes_that_hold_a_foreign_expert() -> None:
    """The owner of expert 0 is in node 0: a copy in node 0 does not cross nodes, two copies in node 1 cross once."""
    assert entry(plan_of([64, 0, 0, 0], [(0, 1)]))["crossings"] == 0
    assert entry(plan_of([64, 0, 0, 0], [(0, 1), (0, 2)]))["crossings"] == 1
    report = entry(plan_of([64, 0, 0, 0], [(0, 1), (0, 2), (0, 3)]))
    assert (report["crossings"], report["copies"]) == (1, 3)
    assert report["limited_by"] is None


def test_lower_bound_is_what_the_slots_allow() -> None:
    """Without slots a device computes all tokens of its experts; with one slot, the hottest can be on every device."""
    plan = plan_of([64, 0, 0, 0], [])
    assert entry(plan, replace(SETTING, memory_slots=0))["lower_bound"] == 4.0
    assert entry(plan)["lower_bound"] == 1.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"memory_slots": 0}, "memory_slots=0 allow 4.000 at best"),
        ({"calibrate": False}, "calibrate=False, so copies are planned from past loads alone"),
        ({"calibrate": "pays"}, "by the cost model further copies cost more than they save"),
        ({"calibrate": "always"}, "the policy found no better copies within memory_slots=1"),
    ],
)
def test_limited_by_names_the_setting(changes: dict[str, object], reason: str) -> None:
    report = entry(plan_of([64, 0, 0, 0], []), replace(SETTING, **changes))  # type: ignore[arg-type]
    assert report["limited_by"] == f"imbalance 4.000 > max_imbalance=1: {reason}"


def test_a_wide_dial_is_met() -> None:
    assert entry(plan_of([64, 0, 0, 0], []), replace(SETTING, max_imbalance=4.0))["limited_by"] is None


def test_copies_are_told_apart_by_when_they_were_made() -> None:
    plan = plan_of([64, 0, 0, 0], [(0, 1), (0, 3)])
    before = plan_of([64, 0, 0, 0], [(0, 3)]).placement
    report = entry(replace(plan, calibration=Calibration(before, plan.placement)))
    assert report["copied"].tolist() == [[0, 1], [0, 3]]  # type: ignore[attr-defined]
    assert report["calibrated"].tolist() == [True, False]  # type: ignore[attr-defined]
    assert entry(plan)["calibrated"].tolist() == [False, False]  # type: ignore[attr-defined]


def test_loads_of_devices_and_of_the_past_are_reported() -> None:
    totals = LayerTotals(np.zeros((4, 4), dtype=np.int64))
    assert totals.report("layer", SETTING)["predicted"] is None
    totals.planned_from = (np.full((4, 4), 1), np.full((4, 4), 3))
    for loads in ([64, 0, 0, 0], [0, 64, 0, 0]):
        plan = plan_of(loads, [(0, 1)])
        totals.add(plan.counts, plan, top_k=1)
    report = totals.report("layer", SETTING)
    assert report["device_loads_before"].tolist() == [64, 64, 0, 0]
    assert report["device_loads_after"].tolist() == [32, 96, 0, 0]
    assert report["predicted"].tolist() == [8, 8, 8, 8]
    assert report["mispredicted"] == 0.5  # half of the tokens would have to change experts


CPU = replace(COST, model=CostModel.cpu())
SLOW = LayerCost(CostModel.cpu(), 1_000_000, 1_000_000, token_flops=600_000, token_bytes=1, dense_token_flops=1)
BALANCED = replace(SETTING, cost=CPU, calibrate="pays")


@pytest.mark.parametrize(
    ("policy", "changes", "planned", "reason"),
    [
        ("ep", {}, True, "the policy ExpertParallel makes none"),
        ("balanced", {"memory_slots": 0}, True, "memory_slots=0"),
        ("balanced", {"max_imbalance": 4.0}, True, "imbalance 4.000 without them is within max_imbalance=4"),
        ("fastermoe", {}, True, "the policy FasterMoE chose none"),
        (
            "balanced",
            {"cost": SLOW},
            True,
            "hiding budget 0 and calibration does not pay (saves 0.48 ms, costs 2.2 ms)",
        ),
        ("balanced", {"calibrate": False}, True, "hiding budget 0 and calibrate=False"),
        (
            "hecate",
            {"cost": replace(SLOW, model=replace(SLOW.model, hidden_permille=500), dense_token_flops=60_000_000)},
            True,
            "hiding budget 2 ms (a copy takes 1.1 ms) and calibration does not pay (saves 0.48 ms, costs 2.2 ms)",
        ),
        (
            "balanced",
            {"cost": replace(SLOW, model=replace(SLOW.model, hidden_permille=455), dense_token_flops=60_000_000)},
            True,
            "45.5 % of a copy's time is hidden, less than half "
            "and calibration does not pay (saves 0.48 ms, costs 2.2 ms)",
        ),
        ("balanced", {"calibrate": False}, False, "no past loads to plan from and calibrate=False"),
        ("hecate", {"calibrate": False, "overlap_degree": 0}, True, "overlap_degree=0 and calibrate=False"),
    ],
)
def test_why_there_are_no_copies(policy: str, changes: dict[str, object], planned: bool, reason: str) -> None:
    setting, chosen = replace(BALANCED, **changes), get_policy(policy)  # type: ignore[arg-type]
    plan = plan_of([64, 0, 0, 0], [])
    if setting.calibrate and policy in ("balanced", "hecate"):
        weighed = chosen.weigh(setting, plan.counts, OWNERS, plan.placement)  # type: ignore[attr-defined]
        plan = replace(plan, calibration=weighed)
    assert why_no_copies(plan, setting, chosen, planned) == f"no copies: {reason}"


def test_limited_by_says_what_was_weighed() -> None:
    plan, setting = plan_of([64, 0, 0, 0], []), replace(BALANCED, cost=SLOW)
    weighed = get_policy("balanced").weigh(setting, plan.counts, OWNERS, plan.placement)  # type: ignore[attr-defined]
    limited = entry(replace(plan, calibration=weighed), setting)["limited_by"]
    assert str(limited).endswith("further copies cost more than they save (2.2 ms against 0.48 ms)")
