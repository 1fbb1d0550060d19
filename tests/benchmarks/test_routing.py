"""`benchmarks.routing` and `benchmarks.one_process`: what they count and compare, on few tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.one_process import OURS, THEIRS, measure
from benchmarks.routing import EXPERTS, LENGTH, POLICIES, ROUTERS, TOP_K, TOPOLOGY, imbalance, record
from hecate.loads.synthetic import synthetic_loads
from hecate.loads.trace import read_trace


@pytest.mark.parametrize("router", ROUTERS)
def test_recorded_loads_are_those_of_the_tokens(router: str, tmp_path: Path) -> None:
    aux = ROUTERS[router][1]
    record(router, aux, 2, tmp_path / "trace.npz")
    trace = read_trace(tmp_path / "trace.npz")
    assert (trace.topology, trace.steps.tolist(), len(trace.layers)) == (TOPOLOGY, [0, 1], 2)
    for layer in trace.layers:
        assert layer.shape == (2, TOPOLOGY.num_devices, EXPERTS)
        assert (layer.sum(axis=2) == LENGTH * TOP_K).all()


def test_imbalance_is_what_each_policy_leaves() -> None:
    loads = synthetic_loads("drift", TOPOLOGY.num_devices, EXPERTS, LENGTH, TOP_K, seed=0, steps=12)
    of_device = loads.sum(axis=1).reshape(12, TOPOLOGY.num_devices, -1).sum(axis=2)
    left = {policy: imbalance(policy, loads, interval=4) for policy in POLICIES}
    assert left["ep"] == pytest.approx(np.mean(of_device.max(axis=1) / of_device.mean(axis=1)))
    assert left["exact"] <= 1.03
    assert left["balanced"] <= 1.03
    assert left["smartmoe"] < left["ep"]
    assert left["hecate"] < left["ep"]


def test_one_block_under_both() -> None:
    found = measure((16, 32, 4, 8), rounds=2)
    assert {name: len(times) for name, times in found.items()} == {OURS: 2, THEIRS: 2}
