"""A small model and a cluster of round numbers."""

from __future__ import annotations

from typing import Any

from hecate.sim.cluster import Cluster
from hecate.sim.model import ModelShape

__all__ = ["cluster", "model"]


def cluster(devices: int = 4, per_node: int = 2, **changes: Any) -> Cluster:
    """1 byte per nanosecond inside nodes, half of that out of a device and out of a node; no fixed costs."""
    values: dict[str, Any] = {
        "name": "round",
        "devices": devices,
        "devices_per_node": per_node,
        "device_bandwidth": 10**9,
        "fabric_bandwidth": 10**12,
        "port_bandwidth": 5 * 10**8,
        "node_bandwidth": 5 * 10**8,
        "burst_bytes": 0,
        "message_ns": 0,
        "peer_ns": 0,
        "barrier_ns": 0,
        "flops": 10**12,
        "dense_flops": 10**12,
        "half_rows": 0,
        "expert_ns": 0,
        "call_ns": 0,
        "layer_ns": 0,
        "plan_ns": 0,
        "memory_bandwidth": 10**15,
        "slowdown_permille": 0,
        "copies_ns": 0,
        "message_work_ns": 0,
        "inside_work_ps": 0,
        "across_work_ps": 0,
        "hidden_permille": 1000,
        "device_memory": 10**9,
        "fixed_memory": 0,
        "on_cpu": False,
    }
    return Cluster(**(values | changes))


def model(**changes: Any) -> ModelShape:
    """Two layers of 8 experts."""
    values: dict[str, Any] = {
        "name": "small",
        "num_layers": 2,
        "d_model": 64,
        "num_experts": 8,
        "top_k": 2,
        "expert_weights": 2 * 64 * 128,
        "dense_weights": 4 * 64 * 64,
        "outer_weights": 0,
        "head_weights": 0,
        "heads": 64,
        "sequence_length": 128,
        "checkpoint": False,
    }
    return ModelShape(**(values | changes))
