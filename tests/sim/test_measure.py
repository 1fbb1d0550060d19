"""A measured profile has all that the simulator and training read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from hecate.cost import CostModel
from hecate.sim.conf import cluster_named
from hecate.sim.measure import DEFAULTS, _settings, profile
from tests.workers import Groups


def measured() -> None:
    tiny = {**DEFAULTS, "width": 128, "tokens": 64, "megabytes": 1, "repeats": 1}
    found = profile(torch.device("cpu"), tiny)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps(found))
        place = cluster_named(str(path))
        assert CostModel.load(path) == place.cost
    assert (place.devices, place.devices_per_node, place.on_cpu) == (2, 2, True)
    assert place.message_ns > 0
    assert len(found["measured"]["experts"]) == 16
    messages = found["measured"]["messages"]
    assert len(messages) == 2 * 4 * 2  # sizes x gathers and reductions x ranks
    assert {(point["inside"], point["across"], point["messages"]) for point in messages} == {
        (number * size, 0, 2 * number) for number in (1, 2) for size in (125_000, 1_000_000)
    }


def test_a_profile_is_complete(groups: Groups) -> None:
    groups(2).run(measured)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "out=FILE is missing"),
        (["out=a", "size=3"], "'size=3': must be key=value"),
        (["out=a", "dtype=int8"], "dtype=int8"),
    ],
)
def test_refuses_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _settings(words)
