"""A measured profile has all that the simulator and training read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from hecate.cost import CostModel
from hecate.sim.conf import cluster_named
from hecate.sim.links import bucket
from hecate.sim.measure import DEFAULTS, _settings, profile
from tests.runtime.helpers import devices_per_node
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


def measured_across_nodes() -> None:
    with devices_per_node(1):
        found = profile(torch.device("cpu"), {**DEFAULTS, "width": 128, "tokens": 64, "megabytes": 1, "repeats": 1})
    place = found["cluster"]
    assert place["devices_per_node"] == 1
    assert min(place["port_bandwidth"], place["node_bandwidth"]) > 1
    assert 0 <= place["burst_bytes"] < 1_000_000 // 32
    assert found["measured"]["links"]["everybody, 31250 bytes"] > 0


def test_a_profile_of_several_nodes(groups: Groups) -> None:
    groups(2).run(measured_across_nodes)


@pytest.mark.parametrize("burst", [0, 60_000])
def test_the_rate_of_a_token_bucket(burst: int) -> None:
    volumes = [128_000, 256_000, 512_000, 1_024_000]
    times = [2_000_000 + 40 * (volume - burst) for volume in volumes]  # 25 MB/s
    rate, found = bucket(2_000_000, volumes, times)
    assert rate == pytest.approx(25_000_000, rel=1e-3)
    assert found == pytest.approx(burst, abs=1)


def test_messages_that_take_no_longer_than_an_empty_one_have_a_rate() -> None:
    rate, burst = bucket(2_000_000, [1000, 2000], [1_900_000, 2_000_000])
    assert rate > 1
    assert burst >= 0


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
