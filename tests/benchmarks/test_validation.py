"""The comparison of simulated and measured steps: calibration, errors, ranking; and that the whole of it runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.validation import compared, shape_of, simulated
from benchmarks.validation_rank import CALIBRATION, SHAPES, WITH_COPIES
from hecate.loads.synthetic import synthetic_loads
from tests.sim.small import cluster

PLACE = cluster(on_cpu=True, hidden_permille=0, slowdown_permille=1000, message_ns=1000, layer_ns=10_000)


def case(shape: str, skew: str, policy: str, steps: int = 4) -> dict[str, Any]:
    """As a rank writes it, with loads of that skew; the times are filled in later."""
    values, kind = SHAPES[shape], "uniform" if skew == "even" else "zipf"
    tokens = values["batch"] * values["length"]
    layers = [
        synthetic_loads(kind, 4, values["num_experts"], tokens, 2, layer, steps=steps, exponent=1.2)  # type: ignore[arg-type]
        for layer in range(values["num_layers"])
    ]
    memory = {"owned": 1000, "optimizer": 1000, "gradients": 1000, "copies": 0}
    counts = np.stack(layers, axis=1).tolist()
    times = {"seconds": [1.0] * 2, "yardstick": [1.0] * 2}
    return {"shape": shape, "skew": skew, "policy": policy, "counts": counts, "memory": memory, **times}


def take(one: dict[str, Any], seconds: float, yardstick: float, slower: float = 1.0) -> None:
    """Measured times on a machine that is so many times slower in its second step."""
    one["seconds"], one["yardstick"] = [seconds, slower * seconds], [yardstick, slower * yardstick]


def test_a_perfect_simulator_has_no_error_and_ranks_right() -> None:
    truth = replace(PLACE, layer_ns=25_000, copies_ns=40_000)
    tried = [("narrow", "zipf 1.2", "ep"), ("narrow", "zipf 1.2", "balanced, ahead")]
    cases = [case(*names) for names in (CALIBRATION, *tried, WITH_COPIES)]
    yardstick = simulated(cases[0], truth).step_ns / 1e9
    for one in cases:
        slower = 1.0 if one is cases[0] else 1.5  # as it may be minutes later
        take(one, simulated(one, truth).step_ns / 1e9, yardstick, slower)
    rows = {(row.setting, row.subject, row.metric): row.value for row in compared(cases, PLACE).rows}
    assert rows["all cases but the calibrations", "simulated", "worst error"] < 1e-3
    assert rows["pairs of one shape more than 5 % apart", "simulated", "ranked right"] == 1.0
    assert ("narrow, even, ep", "simulated", "error") not in rows
    # One case takes twice as long as simulated: an error of one half.
    take(cases[1], 2 * simulated(cases[1], truth).step_ns / 1e9, yardstick, 1.5)
    rows = {(row.setting, row.subject, row.metric): row.value for row in compared(cases, PLACE).rows}
    assert rows["narrow, zipf 1.2, ep", "simulated", "error"] == pytest.approx(-0.5, abs=1e-3)
    assert rows["all cases but the calibrations", "simulated", "mean error"] == pytest.approx(0.25, abs=1e-3)


def test_shapes_are_those_that_are_trained() -> None:
    from benchmarks.validation_rank import config_of
    from hecate.models import GPTMoE

    for shape in SHAPES:
        trained = sum(p.numel() for p in GPTMoE(config_of(shape)).parameters())
        assert shape_of(shape).weights == trained


@pytest.mark.long
def test_the_short_form_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.validation", "--short", "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "ranked right" in done.stdout
    assert "wide, zipf 1.2, balanced, ahead" in done.stdout
