"""Generated counts: their sums, their popularity, and that equal seeds give equal ones."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from hecate.loads.scenario import Scenario, even_counts, inclusion
from hecate.loads.synthetic import synthetic_loads


@pytest.mark.parametrize("kind", ["even", "uniform", "zipf", "drift", "bursts"])
def test_every_token_has_its_experts(kind: str) -> None:
    scenario = Scenario(kind=kind, exponent=2.0)  # type: ignore[arg-type]
    steps = list(islice(scenario.steps(0, 3, 8, 100, 4), 5))
    for counts in steps:
        assert counts.shape == (3, 8)
        assert (counts.sum(axis=1) == 400).all()
        assert counts.min() >= 0
        assert counts.max() <= 100 or kind == "even"  # a token picks an expert at most once
    again = list(islice(scenario.steps(0, 3, 8, 100, 4), 5))
    assert all(np.array_equal(a, b) for a, b in zip(steps, again, strict=True))
    other = next(scenario.steps(1, 3, 8, 100, 4))
    assert kind == "even" or not np.array_equal(other, steps[0])


def test_even_is_even() -> None:
    counts = even_counts(3, 7, 100)
    assert (counts.sum(axis=1) == 100).all()
    assert np.ptp(counts.sum(axis=0)) <= 1


def test_inclusion_is_that_of_drawing_without_replacement() -> None:
    logits = np.log(1 / np.arange(1, 9))
    drawn = synthetic_loads("zipf", 1, 8, 20_000, 3, 0, spread=0.0)[0, 0]
    expected = np.sort(inclusion(logits, 3))[::-1] * 20_000
    assert expected.sum() == pytest.approx(60_000)
    assert np.abs(np.sort(drawn)[::-1] - expected).max() < 0.03 * 20_000
    assert (inclusion(logits, 8) == 1).all()


def test_refuses_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match="drift_rate=2: must be a number in"):
        Scenario(drift_rate=2)
    with pytest.raises(ValueError, match="seed=-1: must be an integer >= 0"):
        Scenario(seed=-1)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 900.0])
def test_inclusion_sums_to_top_k_for_any_skew(spread: float) -> None:
    logits = np.random.default_rng(0).normal(0, spread, (5, 16))
    for top_k in (1, 3, 15):
        found = inclusion(logits, top_k)
        assert ((found >= 0) & (found <= 1 + 1e-9)).all()
        assert found.sum(-1) == pytest.approx(top_k)
        in_order = np.take_along_axis(found, logits.argsort(axis=-1), axis=-1)
        assert (np.diff(in_order, axis=-1) >= -1e-12).all()
