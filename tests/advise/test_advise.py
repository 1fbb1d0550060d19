"""The adviser says what pays, when not to use Hecate, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import hecate
from hecate.advise.report import plot
from hecate.advise.run import _from_where_on, _up_to, advise_on
from hecate.loads.scenario import Scenario
from hecate.loads.trace import Trace
from hecate.placement import Topology
from hecate.sim.conf import cluster_named, model_named
from hecate.sim.settings import Settings
from tests.sim.small import cluster, model

FAST = {"device_bandwidth": 10**11, "port_bandwidth": 10**10, "node_bandwidth": 4 * 10**10, "device_memory": 10**12}


def trace(shares: list[float], layers: int = 2) -> Trace:
    """Three steps of 300 tokens of each of 8 devices, whose experts have these shares in each layer."""
    counts = np.random.default_rng(0).multinomial(600, shares, (3, 8))
    return Trace(Topology(8, 4), np.arange(3), (counts,) * layers)


def test_says_what_to_use_and_from_when_on_it_pays(tmp_path: Path) -> None:
    # Gathering all 256 experts on every device costs more than balancing them.
    place = cluster(8, 4, **FAST)
    shape = model(num_experts=256, num_layers=4)
    advice = advise_on(shape, place, Settings(tokens=512), Scenario(kind="drift", exponent=1.2))
    assert advice.best is not None
    assert advice.best.policy == "balanced"
    assert advice.best in advice.options
    assert advice.over_ep > 1
    assert advice.over_fsdp > 1
    assert advice.break_even_imbalance is not None
    assert 1 <= advice.break_even_imbalance <= advice.imbalance
    said = str(advice)
    for words in ("<- use this", "assumed loads: drift", "Use policy='balanced'", "from imbalance", "owned"):
        assert words in said
    assert json.loads(advice.to_json())["best"]["policy"] == "balanced"
    plot(advice, tmp_path / "advice.png")
    assert (tmp_path / "advice.png").stat().st_size > 1000


def test_says_when_not_to_use_it() -> None:
    alone = hecate.advise(model(), cluster(1, 1, **FAST), tokens=64)
    assert "nothing to balance" in alone.verdict
    small = hecate.advise(model(num_layers=1), cluster(4, 2, **FAST | {"device_memory": 1000}), tokens=64)
    assert small.best is None
    assert small.verdict.startswith("Nothing fits: the least is")
    assert not any(option.fits for option in small.options)
    # Few small experts and many tokens: gathering all weights is cheaper than moving tokens.
    few = advise_on(model(num_experts=4), cluster(4, 2, **FAST), Settings(tokens=8192), Scenario(exponent=0.0))
    assert "Do not use Hecate here: FSDP2" in few.verdict


def test_all_ways_compute_the_tokens_of_the_trace() -> None:
    place = cluster(8, 4, **FAST)
    few, many = (advise_on(model(), place, Settings(tokens=tokens), trace([1 / 8] * 8)) for tokens in (300, 4096))
    assert (few.tokens, many.tokens) == (300, 300)
    assert any(option.grouped for option in few.options)
    assert few.options == many.options


def test_tokens_from_which_it_pays_are_those_for_the_loads_of_the_trace() -> None:
    place, shape = cluster(8, 4, **FAST), model(num_layers=9)
    even, hot = (
        advise_on(shape, place, Settings(), trace(shares, 9)) for shares in ([1 / 8] * 8, [0.65, *([0.05] * 7)])
    )
    assert max(gain for _, gain in even.over_ep_by_tokens) < 1.2  # from tokens that stay in their node
    assert min(gain for _, gain in hot.over_ep_by_tokens) > 3
    assert hot.over_ep_by_imbalance == even.over_ep_by_imbalance  # of generated loads
    assert f"With the loads above they pay from {hot.break_even_tokens} tokens a device." in str(hot)
    assert "of generated loads" in str(hot)


def test_refuses_what_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"cluster=moon: must be .* or one of"):
        hecate.advise("mixtral_8x7b", "moon")
    with pytest.raises(ValueError, match="model=moon"):
        hecate.advise("moon", "h100")
    with pytest.raises(ValueError, match=r"trace=moon.npz: no such file"):
        hecate.advise("mixtral_8x7b", "h100", "moon.npz")


def test_break_even_is_where_the_line_crosses() -> None:
    points = [(1.0, 0.9), (2.0, 1.12), (3.0, 1.5)]
    assert _from_where_on(points) == pytest.approx(1.5)
    assert _from_where_on([(1.0, 1.2), (2.0, 0.9)]) is None
    assert _from_where_on([(1, 1.2), (2, 1.3)]) == 1
    assert _from_where_on([]) is None
    assert _up_to([(100, 1.2), (200, 1.11), (400, 0.91)]) == 300
    assert _up_to([(100, 0.9), (200, 1.1)]) is None


def test_a_big_model_on_few_devices_does_not_fit() -> None:
    advice = advise_on(model_named("deepseek_v3").cut(8), cluster_named("h100", 8), Settings(), Scenario())
    assert advice.best is None
    assert advice.memory_by_kind["owned"] > 0
    assert sum(advice.memory_by_kind.values()) > advice.device_memory
    assert advice.device_memory == 80 * 10**9
