"""Links that several kinds of traffic share: each link divides its time evenly among the kinds that are under way.

D devices, n nodes, R links, K lanes (kinds of traffic). Times are int64 nanoseconds. Traffic is known by the bytes that
it puts on each link, not message by message: that is what 1024 devices need, and what an all-to-all amounts to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Topology
from hecate.sim.cluster import Cluster

__all__ = ["COPIES", "DENSE", "GRADIENTS", "TOKENS", "Network", "Traffic", "averaged", "ring", "traffic_between"]

Int64 = NDArray[np.int64]
TOKENS, COPIES, GRADIENTS, DENSE = range(4)
SECOND = 1_000_000_000


@dataclass(frozen=True, eq=False)
class Traffic:
    """What one collective puts on the links.

    Attributes:
        sends, receives: nanoseconds of each device inside its node `[D]`, of its port `[D]`, and of each node's border
            `[n]`, all int64; out of and into each.
        fabric: int64 `[n]`, nanoseconds of the links inside each node together.
        senders: bool `[source, destination]`, who sends to whom; None if everybody waits for everybody.
        chain_ns: the least time of the collective on idle links, because pieces are relayed.
        sent, received: of each device the bytes that stay in the node, those that do not, and messages; int64 `[3, D]`.
    """

    sends: tuple[Int64, Int64, Int64]
    receives: tuple[Int64, Int64, Int64]
    fabric: Int64
    senders: NDArray[np.bool_] | None
    chain_ns: int
    sent: Int64
    received: Int64

    @property
    def empty(self) -> bool:
        return not self.sent.any()

    @property
    def num_bytes(self) -> int:
        """Of all messages together."""
        return int(self.sent[:2].sum())

    def work_ns(self, cluster: Cluster) -> Int64:
        """Compute that each device loses to the traffic, whatever hides it: int64 `[D]`."""
        inside, across, _ = np.maximum(self.sent, self.received)
        num_bytes = inside * cluster.inside_work_ps + across * cluster.across_work_ps
        return num_bytes // 1000 + (self.sent[2] + self.received[2]) * cluster.message_work_ns

    def __add__(self, other: Traffic) -> Traffic:
        """Two collectives that each device starts one after the other, and that are waited for together.

        Nothing keeps the second from being under way on some links while the first still is on others.
        """
        senders = None if self.senders is None or other.senders is None else self.senders | other.senders
        sends, receives = _summed(self.sends, other.sends), _summed(self.receives, other.receives)
        sent, received = self.sent + other.sent, self.received + other.received
        chain_ns = self.chain_ns + other.chain_ns
        return Traffic(sends, receives, self.fabric + other.fabric, senders, chain_ns, sent, received)

    def reversed(self) -> Traffic:
        """The same messages backwards."""
        senders = None if self.senders is None else np.ascontiguousarray(self.senders.T)
        return Traffic(self.receives, self.sends, self.fabric, senders, self.chain_ns, self.received, self.sent)


def _summed(one: tuple[Int64, Int64, Int64], other: tuple[Int64, Int64, Int64]) -> tuple[Int64, Int64, Int64]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def traffic_between(
    sent: Int64, cluster: Cluster, chain_ns: int = 0, peer_ns: int | None = None, messages: Int64 | None = None
) -> Traffic:
    """The traffic of `sent`, int64 `[D, D]` bytes from each source device to each destination.

    Args:
        sent: the bytes.
        cluster: the links.
        chain_ns: see `Traffic`.
        peer_ns: time of each peer that a device sends to or receives from; None takes the cluster's.
        messages: int64 `[D, D]`, in how many messages; None: one to each destination.
    """
    topology = cluster.topology
    per_node, nodes, devices = topology.devices_per_node, topology.num_nodes, topology.num_devices
    sent = sent.copy()
    np.fill_diagonal(sent, 0)
    blocks = sent.reshape(nodes, per_node, nodes, per_node)
    own = np.arange(nodes)
    inside = blocks[own, :, own, :]  # [n, source, destination]
    peers = cluster.peer_ns if peer_ns is None else peer_ns

    def sides(axis: int) -> tuple[Int64, Int64, Int64]:
        within = inside.sum(axis=2 if axis == 1 else 1).reshape(devices)
        across = sent.sum(axis=axis) - within
        messages = (sent > 0).sum(axis=axis) * peers
        border = across.reshape(nodes, per_node).sum(axis=1)
        local = messages if nodes == 1 else messages * (per_node - 1) // max(1, devices - 1)
        return (
            _ns(within, cluster.device_bandwidth) + local,
            _ns(across, cluster.port_bandwidth) + messages - local,
            _ns(border, cluster.node_bandwidth),
        )

    number = (sent > 0).astype(np.int64) if messages is None else messages
    node = np.arange(devices) // per_node
    kept = np.where(node[:, None] == node, sent, 0)
    totals = [np.stack([each.sum(axis=axis) for each in (kept, sent - kept, number)]) for axis in (1, 0)]
    fabric = _ns(inside.sum(axis=(1, 2)), cluster.fabric_bandwidth)
    return Traffic(sides(1), sides(0), fabric, sent > 0, chain_ns, *totals)


def ring(num_bytes: int, cluster: Cluster) -> Traffic:
    """An all-gather to `num_bytes` on every device (or a reduce-scatter of as many), in rings that enter a node once.

    Each device receives all but its own share from inside its node; a node's ports divide what enters it.
    """
    topology = cluster.topology
    per_node, nodes, devices = topology.devices_per_node, topology.num_nodes, topology.num_devices
    inside = num_bytes * (devices - 1) // devices if per_node > 1 else 0
    entering = num_bytes * (devices - per_node) // devices
    device = np.full(devices, inside, dtype=np.int64)
    port = np.full(devices, -(-entering // per_node), dtype=np.int64)
    side = (
        _ns(device, cluster.device_bandwidth),
        _ns(port, cluster.port_bandwidth),
        _ns(np.full(nodes, entering, dtype=np.int64), cluster.node_bandwidth),
    )
    fabric = _ns(np.full(nodes, inside * per_node, dtype=np.int64), cluster.fabric_bandwidth)
    whole = num_bytes * (devices - 1) // devices
    total = _each((whole - int(port[0]), int(port[0]), devices - 1), devices)
    return Traffic(side, side, fabric, None, cluster.message_ns * (devices - 1).bit_length(), total, total)


def averaged(num_bytes: int, replicas: int, cluster: Cluster) -> Traffic:
    """An all-reduce of `num_bytes` of every device with the devices of other groups that have the same weights.

    The groups are whole nodes, so it goes through the ports: in a ring, twice all but a replica's share.
    """
    topology = cluster.topology
    devices, nodes = topology.num_devices, topology.num_nodes
    across = 2 * num_bytes * (replicas - 1) // replicas
    none = np.zeros(devices, dtype=np.int64)
    side = (
        none,
        _ns(np.full(devices, across, dtype=np.int64), cluster.port_bandwidth),
        _ns(np.full(nodes, across * topology.devices_per_node, dtype=np.int64), cluster.node_bandwidth),
    )
    idle = np.zeros(nodes, dtype=np.int64)
    total = _each((0, across, 2 * (replicas - 1)), devices)
    return Traffic(side, side, idle, None, 2 * cluster.message_ns * (replicas - 1), total, total)


def _each(values: Sequence[int], devices: int) -> Int64:
    """The same values for every device, int64 `[values, D]`."""
    return np.repeat(np.array([values], dtype=np.int64).T, devices, axis=1)


def _ns(num_bytes: Int64, bandwidth: int) -> Int64:
    """Nanoseconds, rounded up; without overflow for up to 2**53 bytes."""
    whole, rest = np.divmod(num_bytes, bandwidth)
    return whole * SECOND + -(-rest * (SECOND // 1000) // -(-bandwidth // 1000))


class Network:
    """All links of a cluster, and the traffic that is under way on them.

    A collective starts and is waited for on all devices in program order. What starts later than a wait does not slow
    down what was waited for.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._topology: Topology = cluster.topology
        self.latency = cluster.message_ns
        self.devices_per_node = self._topology.devices_per_node
        devices, nodes = self._topology.num_devices, self._topology.num_nodes
        sizes = [devices, devices, nodes] * 2 + [nodes]  # out, in, fabric
        ends = np.cumsum([0, *sizes])
        self._parts = [slice(a, b) for a, b in pairwise(ends)]
        self._now = np.zeros(ends[-1], dtype=np.int64)
        self._work = np.zeros((4, ends[-1]), dtype=np.int64)
        self._queued = np.zeros_like(self._work)  # all that was ever started
        self._most_credit = np.zeros_like(self._now)  # work that a link does at once after a pause
        for port, border in ((1, 2), (4, 5)):
            self._most_credit[self._parts[port]] = cluster.burst_bytes * SECOND // cluster.port_bandwidth
            self._most_credit[self._parts[border]] = cluster.burst_bytes * SECOND // cluster.node_bandwidth
        self._credit = self._most_credit.copy()
        self._open: list[Pending] = []

    def start(self, lane: int, traffic: Traffic, at: Int64) -> Pending:
        """Put traffic on the links.

        Args:
            lane: the kind of traffic; of one kind, what started first goes first.
            traffic: what is sent.
            at: int64 `[D]`, when each device starts.
        """
        if traffic.empty:
            return Pending(self, lane, traffic, at, np.zeros(len(self._now), np.bool_), self._queued[lane])
        ns = np.concatenate([*traffic.sends, *traffic.receives, traffic.fabric])
        used = ns > 0
        self._advance(np.where(used, np.maximum(self._begin(traffic, at), self._now), self._now))
        at_once = np.minimum(ns, self._credit)
        self._credit -= at_once
        self._work[lane] += ns - at_once
        self._queued[lane] += ns - at_once
        pending = Pending(self, lane, traffic, at, used, self._queued[lane].copy())
        self._open.append(pending)
        return pending

    def close(self, pending: Pending) -> None:
        """Forget traffic that has been waited for."""
        if pending in self._open:
            self._open.remove(pending)

    def left(self, lane: int, queued: Int64) -> Int64:
        """Work, int64 `[R]`, until the lane has done what was queued when `queued` had been: at most 0 if it has."""
        return self._work[lane] - (self._queued[lane] - queued)

    def end_of(self, left: Int64) -> Int64:
        """When each link has done that much more of one lane, if nothing else starts: int64 `[R]`."""
        return self._now + np.minimum(self._work, left).sum(axis=0)

    def split(self, values: Int64) -> list[Int64]:
        """Values per link as (device out, port out, border out, device in, port in, border in, fabric)."""
        return [values[part] for part in self._parts]

    def _begin(self, traffic: Traffic, at: Int64) -> Int64:
        """When traffic first reaches each link."""
        per_node = self._topology.devices_per_node
        node = at.reshape(-1, per_node).min(axis=1)
        first = np.full_like(at, int(at.min()))
        if traffic.senders is not None:
            first = np.where(traffic.senders, at[:, None], np.iinfo(np.int64).max).min(axis=0)
            first = np.where(traffic.senders.any(axis=0), first, at)
        enter = first.reshape(-1, per_node).min(axis=1)
        return np.concatenate([at, at, node, first, first, enter, node])

    def _advance(self, to: Int64) -> None:
        """Let every link work until `to`: all lanes get equal shares until they have nothing left."""
        for pending in self._open:
            pending.settle(to)
        span = np.maximum(to - self._now, 0)
        ordered = np.sort(self._work, axis=0)
        served = np.zeros_like(span)  # of a lane that is not finished
        before = np.zeros_like(span)
        lanes = len(ordered)
        for i in range(lanes):
            step = np.minimum((ordered[i] - before) * (lanes - i), span)
            served += step // (lanes - i)
            span -= step
            before = ordered[i]
        self._credit = np.minimum(self._most_credit, self._credit + span)  # what is left of it was a pause
        self._work = np.maximum(self._work - served, 0)
        self._now = np.maximum(self._now, to)


class Pending:
    """Traffic under way; made by `Network.start`."""

    def __init__(
        self,
        network: Network,
        lane: int,
        traffic: Traffic,
        at: Int64,
        used: NDArray[np.bool_],
        queued: Int64,
    ) -> None:
        self._network, self._lane, self._traffic, self._at = network, lane, traffic, at
        self._used, self._queued = used, queued
        self._ends = np.zeros_like(queued)  # of links that have done this traffic

    @property
    def empty(self) -> bool:
        return self._traffic.empty

    def settle(self, to: Int64) -> None:
        """Keep when links finish that do so until `to`."""
        left = self._network.left(self._lane, self._queued)
        end = self._network.end_of(left)
        self._ends = np.where(self._used & (left > 0) & (end <= to), end, self._ends)

    def done(self) -> Int64:
        """When each device has sent and received all of its part: int64 `[D]`."""
        traffic, network = self._traffic, self._network
        if traffic.empty:
            return self._at
        per_node = network.devices_per_node
        left = network.left(self._lane, self._queued)
        ends = np.where(self._used & (left > 0), network.end_of(left), self._ends)
        network.close(self)
        out_device, out_port, out_border, in_device, in_port, in_border, fabric = network.split(ends)
        node = np.repeat(fabric, per_node)
        crosses_out, crosses_in = traffic.sends[1] > 0, traffic.receives[1] > 0
        sent = np.maximum(out_device, np.where(traffic.sends[0] > 0, node, 0))
        sent = np.maximum(sent, np.where(crosses_out, np.maximum(out_port, np.repeat(out_border, per_node)), 0))
        received = np.maximum(in_device, np.where(traffic.receives[0] > 0, node, 0))
        received = np.maximum(received, np.where(crosses_in, np.maximum(in_port, np.repeat(in_border, per_node)), 0))
        if traffic.senders is None:
            arrived = np.full_like(sent, int(max(sent.max(), self._at.max())))
        else:
            arrived = np.where(traffic.senders, np.maximum(sent, self._at)[:, None], 0).max(axis=0)
        busy = (sent > 0) | (received > 0)
        end = np.maximum(np.maximum(sent, received), arrived) + network.latency
        return np.where(busy, np.maximum(end, self._at + traffic.chain_ns), self._at)
