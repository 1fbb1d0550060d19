"""Links divide their time among the traffic that is under way; checked against a slow simulation of each nanosecond."""

from __future__ import annotations

import numpy as np
import pytest

from hecate.sim.network import COPIES, DENSE, GRADIENTS, TOKENS, Network, averaged, ring, traffic_between
from tests.sim.small import cluster


def at(*times: int) -> np.ndarray:
    return np.array(times, dtype=np.int64)


def sent(*messages: tuple[int, int, int], devices: int = 4) -> np.ndarray:
    """Int64 `[D, D]` from (source, destination, bytes)."""
    table = np.zeros((devices, devices), dtype=np.int64)
    for source, destination, size in messages:
        table[source, destination] += size
    return table


def test_one_message_takes_its_bytes_and_the_latency() -> None:
    place = cluster(message_ns=7)
    network = Network(place)
    inside = network.start(TOKENS, traffic_between(sent((0, 1, 1000)), place), at(100, 40, 0, 0))
    assert inside.done().tolist() == [1107, 1107, 0, 0]  # 1 byte per ns; others do not take part
    across = Network(place).start(TOKENS, traffic_between(sent((0, 2, 1000)), place), at(0, 0, 500, 0))
    assert across.done().tolist() == [2007, 0, 2007, 0]  # 0.5 bytes per ns


def test_devices_of_a_node_share_its_border() -> None:
    place = cluster()
    both = traffic_between(sent((0, 2, 1000), (1, 3, 1000)), place)
    assert Network(place).start(TOKENS, both, at(0, 0, 0, 0)).done().tolist() == [4000] * 4
    ports = cluster(node_bandwidth=10**9)  # a port each
    both = traffic_between(sent((0, 2, 1000), (1, 3, 1000)), ports)
    assert Network(ports).start(TOKENS, both, at(0, 0, 0, 0)).done().tolist() == [2000] * 4


def test_a_port_lets_a_burst_through_after_a_pause() -> None:
    place = cluster(burst_bytes=400)  # 800 ns of a port or border
    network = Network(place)
    traffic = traffic_between(sent((0, 2, 1000)), place)
    assert network.start(TOKENS, traffic, at(0, 0, 0, 0)).done().tolist() == [1200, 0, 1200, 0]
    # 300 ns of pause fill 150 bytes of the bucket again; 900 are left for the full rate.
    assert network.start(TOKENS, traffic, at(1500, 0, 1500, 0)).done().tolist() == [3200, 0, 3200, 0]
    # After a long pause it is as full as at first, and no fuller.
    assert network.start(TOKENS, traffic, at(90_000, 0, 90_000, 0)).done().tolist() == [91_200, 0, 91_200, 0]


def test_work_is_counted_by_message_and_byte() -> None:
    place = cluster(message_work_ns=10, inside_work_ps=2000, across_work_ps=500)
    traffic = traffic_between(sent((0, 1, 1000), (0, 2, 200), (1, 0, 300)), place)
    assert traffic.work_ns(place).tolist() == [2 * 1000 + 100 + 30, 2 * 1000 + 20, 100 + 10, 0]
    assert traffic.reversed().work_ns(place).tolist() == traffic.work_ns(place).tolist()
    assert (traffic + traffic).work_ns(place).tolist() == [2 * ns for ns in traffic.work_ns(place)]
    assert ring(8000, place).work_ns(place).tolist() == [2 * 4000 + 1000 + 60] * 4
    assert not traffic.work_ns(cluster()).any()


def test_a_receiver_waits_for_its_slowest_sender() -> None:
    place = cluster()
    traffic = traffic_between(sent((0, 1, 1000), (2, 1, 500)), place)
    done = Network(place).start(TOKENS, traffic, at(0, 0, 9000, 0)).done()
    assert done.tolist() == [1000, 10_000, 10_000, 0]


def test_backwards_is_the_transpose() -> None:
    place = cluster(6, 3)
    table = np.random.default_rng(0).integers(0, 1000, (6, 6))
    back, other = traffic_between(table, place).reversed(), traffic_between(table.T, place)
    for a, b in zip(
        (*back.sends, *back.receives, back.fabric), (*other.sends, *other.receives, other.fabric), strict=True
    ):
        assert np.array_equal(a, b)
    assert np.array_equal(back.senders, other.senders)


def test_a_ring_gathers_all_but_the_own_share() -> None:
    place = cluster(8, 4, node_bandwidth=2 * 10**9)
    traffic = ring(8000, place)
    assert traffic.receives[0].tolist() == [7000] * 8  # 1 byte per ns
    assert traffic.receives[1].tolist() == [2000] * 8  # 4000 enter a node through 4 ports of 0.5 bytes per ns
    assert traffic.receives[2].tolist() == [2000] * 2
    assert traffic.num_bytes == 7000 * 8
    alone = cluster(4, 1, message_ns=10)  # one device a node: all through its port
    assert ring(8000, alone).sends[0].tolist() == [0] * 4
    assert Network(alone).start(DENSE, ring(8000, alone), at(0, 0, 0, 0)).done().tolist() == [12_010] * 4
    assert ring(8000, cluster(1, 1)).empty
    assert averaged(1000, 4, place).sends[1].tolist() == [3000] * 8  # 2 * 3/4 * 1000 bytes


def test_a_sum_is_done_when_both_are() -> None:
    place, starts = cluster(4, 4, message_ns=7), at(0, 0, 0, 0)
    inside, outside = ring(8000, place), averaged(500, 2, place)  # 6000 bytes over 1 per ns; 2000 of a node over 0.5
    for traffic, end in ((inside, 6007), (outside, 4007), (inside + outside, 6007)):
        assert Network(place).start(DENSE, traffic, starts).done().tolist() == [end] * 4
    assert (inside + outside).num_bytes == 6000 * 4 + 500 * 4
    assert (inside + outside).chain_ns == 2 * 7 + 2 * 7
    assert averaged(500, 1, place).empty
    messages = [(0, 1, 1000), (0, 3, 600)]
    one, two, all_of = (traffic_between(sent(*some), place) for some in (messages[:1], messages[1:], messages))
    assert np.array_equal((one + two).senders, all_of.senders)
    assert Network(place).start(TOKENS, one + two, starts).done().tolist() == [1607, 1607, 0, 1607]


def shared(jobs: list[tuple[int, int]]) -> list[int]:
    """When jobs (start, work), one per lane, end on one link that turns to another job every unit."""
    left, ends, now = [float(work) for _, work in jobs], [0] * len(jobs), 0
    while any(left):
        active = [i for i, (start, _) in enumerate(jobs) if start <= now and left[i] > 0]
        for i in active:
            left[i] -= 1 / len(active)
            if left[i] <= 1e-9:
                left[i], ends[i] = 0.0, now + 1
        now += 1
    return ends


def test_one_lane_is_a_queue() -> None:
    place = cluster(2, 2)
    network = Network(place)
    traffic = traffic_between(sent((0, 1, 1000), devices=2), place)
    first = network.start(DENSE, traffic, at(0, 0))
    second = network.start(DENSE, traffic, at(100, 100))
    other = network.start(TOKENS, traffic, at(500, 500))
    # 500 alone, then half of the link each: 1000 more for the first, 1000 for half of the second, 1000 alone.
    assert first.done().tolist() == [1500, 1500]
    assert other.done().tolist() == [2500, 2500]
    assert second.done().tolist() == [3000, 3000]


@pytest.mark.parametrize("seed", range(5))
def test_lanes_share_a_link_evenly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    jobs = sorted((int(start), int(work)) for start, work in rng.integers(1, 300, (4, 2)))
    place = cluster(2, 2)
    network = Network(place)
    pending = [
        network.start(lane, traffic_between(sent((0, 1, work), devices=2), place), at(start, start))
        for lane, (start, work) in zip((TOKENS, COPIES, GRADIENTS, DENSE), jobs, strict=True)
    ]
    found = [int(p.done()[0]) for p in pending]  # waited for after all have started, so all slow each other down
    for mine, other in zip(found, shared(jobs), strict=True):
        assert abs(mine - other) <= 8  # both round
