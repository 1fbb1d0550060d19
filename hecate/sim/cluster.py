"""What the simulator knows of a cluster: devices, links, and how fast a device computes and moves memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hecate.collectives.route import Links
from hecate.cost import CostModel
from hecate.placement import Topology
from hecate.sim.fields import check_integers, record_of

__all__ = ["Cluster", "read_cluster"]

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """A cluster in integers: bytes, bytes per second, operations per second, nanoseconds, 1/1000.

    Attributes:
        name: for tables.
        devices: number of devices.
        devices_per_node: devices that share the links called "inside".
        device_bandwidth: bytes per second into or out of one device, inside its node.
        fabric_bandwidth: bytes per second between all devices of a node together.
        port_bandwidth: bytes per second of one device out of or into its node.
        node_bandwidth: bytes per second out of or into a node, all its devices together.
        burst_bytes: bytes that pass a port, and a node's border, at once after a pause, before its bandwidth holds, as
            where a token bucket limits the rate.
        message_ns: fixed time of a message.
        peer_ns: time that each further peer of a token exchange costs, beside its bytes.
        barrier_ns: time of one exchange of counts, per doubling of the number of devices.
        flops: operations per second of large expert products.
        dense_flops: operations per second of the non-MoE part.
        half_rows: rows of one expert at which its product reaches half of `flops`.
        expert_ns: fixed time per expert that has rows, per pass.
        call_ns: fixed time of one expert product over any number of experts, per pass.
        layer_ns: fixed time of one layer's forward pass: launches, host.
        plan_ns: host time between counts and exchange, per layer.
        memory_bandwidth: bytes per second, read or written, of permutations and optimizers.
        slowdown_permille: share of the time of traffic that runs beside compute by which it delays compute.
        copies_ns: time per layer that nothing hides, of each expert with copies that a device owns or holds a copy of:
            calls to pack rows and sum gradients. 0 where the host runs ahead of the device.
        message_work_ns: compute that a device loses to each message beside it, sent or received, whatever hides it.
        inside_work_ps: compute that it loses per byte beside it that stays in the node, in picoseconds; of what it
            sends and what it receives the larger counts. 0 where engines beside the cores move bytes.
        across_work_ps: the same per byte that leaves or enters the node.
        hidden_permille: what policies are told, see `CostModel`.
        device_memory: bytes of one device.
        fixed_memory: bytes of it that libraries and process groups take.
        on_cpu: whether ranks are processes that share a machine's cores.
    """

    name: str
    devices: int
    devices_per_node: int
    device_bandwidth: int
    fabric_bandwidth: int
    port_bandwidth: int
    node_bandwidth: int
    burst_bytes: int
    message_ns: int
    peer_ns: int
    barrier_ns: int
    flops: int
    dense_flops: int
    half_rows: int
    expert_ns: int
    call_ns: int
    layer_ns: int
    plan_ns: int
    memory_bandwidth: int
    slowdown_permille: int
    copies_ns: int
    message_work_ns: int
    inside_work_ps: int
    across_work_ps: int
    hidden_permille: int
    device_memory: int
    fixed_memory: int
    on_cpu: bool

    def __post_init__(self) -> None:
        times = [field.name for field in fields(self) if field.name.endswith(("_ns", "_ps", "_permille"))]
        may_be_zero = [*times, "half_rows", "burst_bytes", "fixed_memory"]
        check_integers(f"cluster {self.name}", self, ("name", "on_cpu"), may_be_zero)
        if self.devices % min(self.devices, self.devices_per_node):
            raise ValueError(
                f"cluster {self.name}: devices={self.devices} must be a multiple of "
                f"devices_per_node={self.devices_per_node}"
            )
        for name in ("slowdown_permille", "hidden_permille"):
            if getattr(self, name) > 1000:
                raise ValueError(f"cluster {self.name}: {name}={getattr(self, name)}, must be <= 1000")

    @property
    def topology(self) -> Topology:
        """Fewer devices than a node has are one node."""
        return Topology(self.devices, min(self.devices, self.devices_per_node))

    @property
    def links(self) -> Links:
        """What routes are made for."""
        return Links(
            device=self.device_bandwidth,
            fabric=self.fabric_bandwidth,
            crossing=self.port_bandwidth,
            border=self.node_bandwidth,
            message_ns=self.message_ns,
            relay_ns=self.message_ns,
        )

    @property
    def cost(self) -> CostModel:
        """What policies are told; the bandwidth between nodes is a device's share while all devices use it."""
        return CostModel(
            intra_node_bandwidth=min(self.device_bandwidth, self.fabric_bandwidth // self.topology.devices_per_node)
            if self.on_cpu
            else self.device_bandwidth,
            inter_node_bandwidth=min(self.port_bandwidth, self.node_bandwidth // self.topology.devices_per_node),
            message_ns=self.message_ns,
            flops=self.flops,
            hidden_permille=self.hidden_permille,
        )

    def resized(self, devices: int) -> Cluster:
        """The same cluster with another number of devices."""
        return replace(self, devices=devices)


def read_cluster(values: Mapping[str, Any], name: str) -> Cluster:
    """The cluster that a file of conf/sim/cluster describes; ValueError lists what is missing or unknown."""
    return record_of(Cluster, f"cluster {name}", values)
