"""Measures the links between the ranks of a job, for `hecate.sim.measure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hecate.placement import Topology
from hecate.ranks.agree import gather
from hecate.ranks.messages import all_gather_into, all_to_all
from hecate.sim.clock import SECOND, Clock, fit

__all__ = ["Measured", "bucket", "measure_links"]

PARTS = (32, 16, 8, 4)
"""Messages between all are so many times smaller than those of pairs."""


@dataclass(frozen=True)
class Measured:
    """Links.

    Attributes:
        fitted: attributes of `hecate.sim.cluster.Cluster`.
        times: what was measured, in nanoseconds.
    """

    fitted: dict[str, int]
    times: dict[str, int]


def measure_links(clock: Clock, topology: Topology, size: int) -> Measured:
    """Messages of `size` bytes and of twice as many, between pairs inside a node and across nodes; collective.

    A line through these and an empty message gives the rate, so that fixed time does not count. What a node's border
    carries when all devices send to all is more than one of its ports does, and than its pairs do: several connections
    share it. So that is measured with smaller messages between all.
    """
    pairs = _Pairs(clock, topology)
    per_node, several = topology.devices_per_node, topology.num_nodes > 1
    message = pairs.exchange(pairs.beside if per_node > 1 else pairs.across, 8)
    times = {"message": message, "everybody": pairs.everybody(8), "counts": pairs.counts()}
    for name, peer in pairs.kinds.items():
        times[name], times[f"{name} twice"] = pairs.exchange(peer, size), pairs.exchange(peer, 2 * size)

    def speed(name: str, num_bytes: int) -> int:
        rows = [[0, 1], [num_bytes, 1], [2 * num_bytes, 1]]
        per_byte, _ = fit(rows, [message, times[name], times[f"{name} twice"]])
        return max(1, int(SECOND / per_byte))

    inside = max(1, per_node // 2 * 2)
    alone, together = ("alone", "together") if per_node > 1 else ("port", "port")
    port = speed("port" if several else alone, size)
    node_bandwidth, burst = speed(together, size * per_node), 0
    if several:
        sizes = [size // part for part in PARTS]
        crossing = per_node * (topology.num_devices - per_node)  # messages from one node to others
        everybody = [pairs.everybody(each) for each in sizes]
        times |= {f"everybody, {each} bytes": ns for each, ns in zip(sizes, everybody, strict=True)}
        node_bandwidth, burst = bucket(message, [crossing * each for each in sizes], everybody)
    return Measured(
        {
            "device_bandwidth": speed(alone, size),
            "fabric_bandwidth": speed(together, size * inside),
            "port_bandwidth": port,
            "node_bandwidth": node_bandwidth,
            "burst_bytes": burst,
            "message_ns": message,
            "peer_ns": max(0, times["everybody"] - message) // max(1, topology.num_devices - 1),
            "barrier_ns": times["counts"] // max(1, (topology.num_devices - 1).bit_length()),
        },
        times,
    )


def bucket(message: int, volumes: Sequence[int], times: Sequence[int]) -> tuple[int, int]:
    """Bytes per second, and bytes that pass before that rate holds, of a link that carries `volumes` bytes in `times`.

    Args:
        message: nanoseconds without bytes.
        volumes: ascending.
        times: nanoseconds.
    """
    best = (float("inf"), 1, 0)
    for step in range(64):
        burst = volumes[0] * step // 64
        late = [0, *(volume - burst for volume in volumes)]
        per_byte, fixed = fit([[volume, 1] for volume in late], [message, *times])
        found = [per_byte * volume + fixed for volume in late]
        error = sum((own / ns - 1) ** 2 for own, ns in zip(found, [message, *times], strict=True))
        best = min(best, (error, max(1, int(SECOND / per_byte)), burst))
    return best[1], best[2]


class _Pairs:
    """Exchanges of this rank with one peer, and with all."""

    def __init__(self, clock: Clock, topology: Topology) -> None:
        self._clock, self._topology = clock, topology
        self._rank, per_node = dist.get_rank(), topology.devices_per_node
        self._local, node = self._rank % per_node, self._rank // per_node
        other = self._local ^ 1
        self.beside = node * per_node + (other if other < per_node else self._local)
        self.across = (self._rank + per_node) % topology.num_devices

    @property
    def kinds(self) -> dict[str, int]:
        """What is measured, and this rank's peer in it; a rank without one is its own."""
        kinds = {}
        if self._topology.devices_per_node > 1:
            kinds = {"alone": self.beside if self._rank < 2 else self._rank, "together": self.beside}
        if self._topology.num_nodes > 1:
            kinds["port"] = self.across if self._local == 0 else self._rank
        return kinds

    def exchange(self, peer: int, num_bytes: int) -> int:
        """Send to `peer` and receive from the rank that has this one as its peer."""
        devices, rank = self._topology.num_devices, self._rank
        peers = gather(peer)
        sent = [num_bytes if other == peer and other != rank else 0 for other in range(devices)]
        received = [num_bytes if peers[other] == rank and other != rank else 0 for other in range(devices)]
        rows = torch.zeros(sum(sent), 1, dtype=torch.uint8, device=self._clock.device)
        out = torch.zeros(sum(received), 1, dtype=torch.uint8, device=self._clock.device)
        return self._clock(lambda: all_to_all(out, rows, received, sent, dist.group.WORLD))

    def everybody(self, num_bytes: int) -> int:
        """A message from everybody to everybody."""
        devices = self._topology.num_devices
        rows = torch.zeros(devices, num_bytes, dtype=torch.uint8, device=self._clock.device)
        out = torch.empty_like(rows)
        return self._clock(lambda: all_to_all(out, rows, [1] * devices, [1] * devices, dist.group.WORLD))

    def counts(self) -> int:
        """What a layer exchanges before it plans."""
        counts = torch.zeros(64, dtype=torch.int64, device=self._clock.device)
        table = torch.zeros(64 * self._topology.num_devices, dtype=torch.int64, device=self._clock.device)
        return self._clock(lambda: all_gather_into(table, counts, dist.group.WORLD))
