"""The time of steps: by formulas where one can say it, and as it must compare where not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hecate.loads.scenario import Scenario
from hecate.loads.trace import Trace
from hecate.placement import Topology
from hecate.sim.conf import cluster_named, model_named
from hecate.sim.run import ceiling, simulate, with_tokens
from hecate.sim.settings import FSDP, Precision, Settings
from tests.sim.small import cluster, model

EP = Settings(policy="ep", memory_slots=0, tokens=1024)
SKEWED = Scenario(kind="zipf", exponent=1.2)


def test_one_device_computes_and_sends_nothing() -> None:
    found = simulate(model(), cluster(1, 1), EP, Scenario(kind="even"), steps=2, warm_up=0)
    dense = 3 * 2 * 1024 * (2 * 4 * 64 * 64 + 2 * 128 * 64)  # passes x layers x tokens x operations, 1 per ps
    experts = 3 * 2 * 2048 * 2 * 2 * 64 * 128
    step = found.steps[0]
    assert step.dense_ns == pytest.approx(dense / 1000, abs=6)  # a nanosecond a pass
    assert step.expert_ns == pytest.approx(experts / 1000, rel=1e-4)
    assert step.tokens_ns == step.counts_ns == step.exposed_dense_ns == 0
    assert step.step_ns == step.dense_ns + step.expert_ns + step.packing_ns + step.optimizer_ns


def test_an_even_load_is_the_ceiling_and_skew_costs_in_proportion() -> None:
    place = cluster(slowdown_permille=0, port_bandwidth=10**15, node_bandwidth=10**15, device_bandwidth=10**15)
    even = simulate(model(), place, EP, Scenario(kind="even"), steps=1, warm_up=0)
    assert even.step_ns == ceiling(model(), place, EP).step_ns
    assert even.imbalance_before == 1.0
    assert ceiling(model(num_experts=3), place, EP).imbalance_after == 1.0  # fewer experts than devices
    skewed = simulate(model(), place, EP, SKEWED, steps=3)
    # Links cost next to nothing here, so the busiest device's experts decide.
    expected = even.mean_ns("expert_ns") * (skewed.imbalance_after - 1)
    assert skewed.step_ns - even.step_ns == pytest.approx(expected, rel=0.05)


def test_equal_seeds_give_equal_nanoseconds() -> None:
    settings = Settings(policy="balanced", tokens=512)
    first, again = (simulate(model(), cluster(), settings, Scenario(kind="bursts"), steps=3) for _ in range(2))
    assert first.steps == again.steps
    other = simulate(model(), cluster(), settings, Scenario(kind="bursts", seed=1), steps=3)
    assert other.steps != first.steps


@pytest.mark.parametrize("rematerialize", [False, True])
def test_copies_make_skewed_steps_faster(rematerialize: bool) -> None:
    place = cluster(8, 4, device_bandwidth=10**11, port_bandwidth=10**10, node_bandwidth=4 * 10**10)
    ep = simulate(model(), place, EP, SKEWED, steps=2)
    settings = Settings(policy="balanced", tokens=1024, rematerialize=rematerialize)
    ours = simulate(model(), place, settings, SKEWED, steps=2)
    best = ceiling(model(), place, EP)
    # Where links decide, copies may even be faster than an even load without any: tokens stay at home.
    assert max(best.step_ns, ours.step_ns) < ep.step_ns
    assert ours.imbalance_after < 1.1 < ep.imbalance_after
    assert (
        ours.memory.copies < simulate(model(num_layers=4), place, settings, SKEWED, 1).memory.copies
    ) != rematerialize


def test_known_loads_are_within_4_percent_of_the_ceiling_under_bursts() -> None:
    # Inside one NVLink domain; over two tiers the ports between nodes are not balanced (docs/will_it_pay.md).
    place, shape = cluster_named("h100", 8), model_named("qwen3_30b_a3b").cut(12)
    bursts = Scenario(kind="bursts")
    best = ceiling(shape, place, Settings(tokens=8192))
    known, past = (
        simulate(shape, place, Settings(tokens=8192, calibrate=False, foreseen=foreseen), bursts, 6)
        for foreseen in (True, False)
    )
    assert best.step_ns / known.step_ns >= 0.96
    assert known.step_ns <= past.step_ns


def test_messages_beside_compute_are_not_free_where_they_take_work() -> None:
    """On links without limits nothing is waited for, so every byte's work is exposed; in waits it is hidden."""
    endless = {f"{kind}_bandwidth": 10**15 for kind in ("device", "fabric", "port", "node")}
    settings = Settings(policy="balanced", tokens=1024, overlap_degree=2, calibrate=False, reshard_interval=0)
    free = simulate(model(), cluster(**endless), settings, SKEWED, steps=1)
    works = simulate(model(), cluster(**endless, inside_work_ps=4000, across_work_ps=4000), settings, SKEWED, steps=1)
    assert free.steps[0].exposed_copies_ns == 0 < free.copies
    assert works.steps[0].exposed_copies_ns > 0
    assert works.steps[0].exposed_gradients_ns > 0
    assert works.step_ns > free.step_ns
    waits = simulate(
        model(),
        cluster(**endless, inside_work_ps=4000, across_work_ps=4000, barrier_ns=10**9),
        settings,
        SKEWED,
        steps=1,
    )
    assert waits.steps[0].exposed_copies_ns == 0


def test_copies_that_are_a_stack_of_their_own_take_a_product_of_their_own() -> None:
    settings = Settings(policy="balanced", tokens=1024, overlap_degree=2, reshard_interval=0)
    apart = replace(settings, precision=Precision(4, 4, 4, 2))
    with_casts, in_place = (
        [simulate(model(), cluster(call_ns=ns), s, SKEWED, steps=1).mean_ns("expert_ns") for ns in (0, 1000)]
        for s in (settings, apart)
    )
    calls = 3 * model().num_layers
    assert with_casts[1] - with_casts[0] == 1000 * calls
    assert 1000 * calls < in_place[1] - in_place[0] <= 2000 * calls


def test_fsdp_does_not_mind_skew() -> None:
    settings = Settings(policy=FSDP, memory_slots=0, tokens=512)
    even, skewed = (simulate(model(), cluster(), settings, loads, 1) for loads in (Scenario(kind="even"), SKEWED))
    assert even.steps == skewed.steps
    assert skewed.imbalance_after == 1.0


def test_replicas_wait_for_the_reduction_inside_their_group() -> None:
    # Gathering and reducing inside a node decide the time; the average over the replicas costs next to nothing.
    place = cluster(4, 4, device_bandwidth=10**8, port_bandwidth=10**15, node_bandwidth=10**15)
    one, two = (simulate(model(), place, replace(EP, replicas=n), SKEWED, 1, 0) for n in (1, 2))
    assert one.mean_ns("exposed_dense_ns") > 0
    assert two.step_ns == pytest.approx(one.step_ns, abs=10)
    slow = simulate(model(), replace(place, port_bandwidth=10**7), replace(EP, replicas=2), SKEWED, 1, 0)
    assert slow.step_ns > two.step_ns


def test_traces_bring_their_tokens_or_are_spread() -> None:
    counts = np.random.default_rng(0).multinomial(600, [1 / 8] * 8, (3, 4))  # steps, devices
    trace = Trace(Topology(4, 2), np.arange(3), (counts, counts))
    own = with_tokens(EP, trace, model(), cluster())
    assert own.tokens == 300
    found = simulate(model(), cluster(), own, trace, 3, 0)
    owned = counts.sum(axis=1).reshape(3, 4, 2).sum(axis=2)  # steps, owners
    assert found.imbalance_before == pytest.approx((owned.max(axis=1) * 4 / owned.sum(axis=1)).mean())
    assert with_tokens(EP, trace, model(), cluster(8, 2)) == EP
    assert with_tokens(EP, SKEWED, model(), cluster()) == EP
    # Also on as many devices, the tokens that are asked for are those that are computed.
    for place in (cluster(), cluster(8, 2)):
        once, twice = (simulate(model(), place, replace(EP, tokens=n), trace, 3, 0) for n in (300, 600))
        assert twice.mean_ns("dense_ns") == pytest.approx(2 * once.mean_ns("dense_ns"), rel=1e-4)
        assert twice.mean_ns("expert_ns") == pytest.approx(2 * once.mean_ns("expert_ns"), rel=1e-4)
    with pytest.raises(ValueError, match=r"2 layers of .8. experts, must have steps, and as model small 3 layers"):
        simulate(model(num_layers=3), cluster(), EP, trace)


def test_resharding_moves_state_and_helps() -> None:
    place = cluster(4, 2, hidden_permille=0, device_bandwidth=10**11, port_bandwidth=10**10, node_bandwidth=10**10)
    changes = {"policy": "hecate", "memory_slots": 0, "calibrate": False, "tokens": 1024}
    settings = Settings(**changes, reshard_interval=4)  # type: ignore[arg-type]
    stays = simulate(model(num_experts=32), place, replace(settings, reshard_interval=0), SKEWED, 8, 0)
    moves = simulate(model(num_experts=32), place, settings, SKEWED, 8, 0)
    assert moves.steps[:4] == stays.steps[:4]
    assert moves.steps[4].optimizer_ns > stays.steps[4].optimizer_ns  # owners change before step 4
    assert moves.imbalance_after < stays.imbalance_after
