"""The time of one step: every device's compute, and beside it streams of tokens, copies, gradients and dense weights.

The order of events is that of `runtime/step/passes.py` and of FSDP2 with prefetching: copies of layer l + 1 are
launched when layer l is done, and waited for before the experts compute; gradients of copies are launched when the
experts' backward is done, and waited for one MoE layer later; FSDP2 gathers a block ahead and reduces behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecate.sim.cluster import Cluster
from hecate.sim.model import ModelShape
from hecate.sim.network import COPIES, DENSE, GRADIENTS, TOKENS, Network, Pending, Traffic, averaged, ring
from hecate.sim.plans import PlannedLayer
from hecate.sim.settings import FSDP, Settings

__all__ = ["Timing", "time_step"]

Int64 = NDArray[np.int64]
SECOND = 1_000_000_000


@dataclass(frozen=True)
class Timing:
    """Nanoseconds of one step. All but `step_ns` are means over the devices, summed over layers.

    Attributes:
        step_ns: from the first device's start to the last device's end.
        dense_ns: non-MoE compute, recomputation included.
        expert_ns: expert compute.
        tokens_ns: from a device's readiness to send or return rows until they are there; waiting for slower devices
            is part of it.
        counts_ns: exchange of counts, waiting for slower devices included, and planning after the gate.
        packing_ns: permutations of rows.
        exposed_copies_ns: compute waits for copies, packs them, and is slowed down by their traffic.
        exposed_gradients_ns: the same for copies' gradients.
        exposed_dense_ns: the same for FSDP2's traffic.
        optimizer_ns: optimizer and re-sharding.
    """

    step_ns: int
    dense_ns: int
    expert_ns: int
    tokens_ns: int
    counts_ns: int
    packing_ns: int
    exposed_copies_ns: int
    exposed_gradients_ns: int
    exposed_dense_ns: int
    optimizer_ns: int


def time_step(
    model: ModelShape, cluster: Cluster, settings: Settings, layers: Sequence[PlannedLayer], moved: Traffic | None
) -> Timing:
    """The time of one step.

    Args:
        model: what is trained.
        cluster: where.
        settings: how.
        layers: all layers of the step, in order.
        moved: the traffic of re-sharding before it.
    """
    return _Step(model, cluster, settings, layers).run(moved)


class _Step:
    """The clocks of all devices in one step: `self.now`, int64 `[D]`, is when each device's compute is free.

    What traffic beside compute takes from it (`Traffic.work_ns`) is done while the device waits for something else;
    what is left of it delays compute where that waits for such traffic.
    """

    def __init__(self, model: ModelShape, cluster: Cluster, settings: Settings, layers: Sequence[PlannedLayer]) -> None:
        self.model, self.cluster, self.settings, self.layers = model, cluster, settings, layers
        self.network = Network(cluster)
        self.devices = cluster.topology.num_devices
        self.now = np.zeros(self.devices, dtype=np.int64)
        self.owed = np.zeros(self.devices, dtype=np.int64)  # work of traffic beside compute that is not done yet
        self.spent = {name: 0 for name in Timing.__dataclass_fields__ if name != "step_ns"}
        self.alone = self.devices == 1
        self.fsdp = settings.policy == FSDP
        precision = settings.precision
        self.in_place = precision.param_bytes == precision.master_bytes
        weights = model.dense_weights + (model.num_experts * model.expert_weights if self.fsdp else 0)
        self.gather = ring(weights * precision.param_bytes, cluster)
        slots = -(-model.num_experts // self.devices) * model.expert_weights
        own = (slots + model.dense_weights // self.devices) * precision.reduce_bytes
        self.reduce = ring(weights * precision.reduce_bytes, cluster) + averaged(own, settings.replicas, cluster)
        self.outer = ring(model.outer_weights * precision.param_bytes, cluster)

    def run(self, moved: Traffic | None) -> Timing:
        if moved is not None:
            self._wait("optimizer_ns", self.network.start(TOKENS, moved, self.now))
        copies = self._copies(self.layers[0].ahead)
        dense = self._dense_traffic(self.gather)
        for i, layer in enumerate(self.layers):
            self._arrived("exposed_dense_ns", dense)
            dense = self._dense_traffic(self.gather if i + 1 < len(self.layers) else self.outer)
            copies = self._forward(layer, copies, i)
        self._arrived("exposed_dense_ns", dense)
        self._compute("dense_ns", 3 * self._head_ns())
        self._backward()
        self._optimizer()
        spent = {name: value // self.devices for name, value in self.spent.items()}
        return Timing(step_ns=int(self.now.max()), **spent)

    # Passes.

    def _forward(self, layer: PlannedLayer, copies: Pending, i: int) -> Pending:
        self._dense_compute(1)
        if not self.fsdp:
            self._counts()
        added = self._copies(layer.added)
        self._move_tokens(layer.tokens, layer)
        self._arrived("exposed_copies_ns", copies)
        self._arrived("exposed_copies_ns", added)
        self._experts(layer, 1)
        self._move_tokens(layer.tokens.reversed(), layer)
        return self._copies(self.layers[i + 1].ahead) if i + 1 < len(self.layers) else copies

    def _backward(self) -> None:
        last = len(self.layers) - 1
        again = self._copies(self.layers[last].again) if self.settings.rematerialize else None
        dense: Pending | None = self._dense_traffic(self.gather)
        reduced: Pending | None = None
        gradients: Pending | None = None
        for i in range(last, -1, -1):
            layer = self.layers[i]
            self._arrived("exposed_dense_ns", dense)
            dense = self._dense_traffic(self.gather) if i else None
            if self.model.checkpoint:
                self._dense_compute(1)
                self._move_tokens(layer.tokens, layer)
                self._arrived("exposed_copies_ns", again)
                self._experts(layer, 1)
                self._move_tokens(layer.tokens.reversed(), layer)
            self._move_tokens(layer.tokens, layer)
            self._arrived("exposed_copies_ns", again)
            self._experts(layer, 2)
            self._arrived("exposed_gradients_ns", gradients)
            gradients = self._gradients(layer)
            if self.settings.rematerialize:
                again = self._copies(self.layers[i - 1].again) if i else None
            self._move_tokens(layer.tokens.reversed(), layer)
            self._dense_compute(2)
            self._arrived("exposed_dense_ns", reduced)
            reduced = self._dense_traffic(self.reduce)
        self._arrived("exposed_gradients_ns", gradients)
        self._arrived("exposed_dense_ns", reduced)
        self._arrived("exposed_dense_ns", self._dense_traffic(self.outer))

    def _optimizer(self) -> None:
        """Read weight, gradient and moments, write weight and moments; all of this device's weights."""
        precision = self.settings.precision
        own = -(-self.model.weights // self.devices)
        self._touch("optimizer_ns", own * precision.master_bytes * (3 + 2 * precision.moments))
        self._compute(
            "optimizer_ns", self.cluster.barrier_ns * (self.devices * self.settings.replicas - 1).bit_length()
        )

    # One event each.

    def _dense_compute(self, passes: int) -> None:
        flops = passes * self.model.dense_token_flops * self.settings.tokens
        self._compute("dense_ns", flops * SECOND // self.cluster.dense_flops + passes * self.cluster.layer_ns)

    def _head_ns(self) -> int:
        return 2 * self.model.head_weights * self.settings.tokens * SECOND // self.cluster.dense_flops

    def _counts(self) -> None:
        """Everybody waits for everybody's counts, then plans."""
        if not self.alone:
            exchange = self.cluster.barrier_ns * (self.devices - 1).bit_length()
            self._until("counts_ns", np.full_like(self.now, int(self.now.max()) + exchange))
        self._compute("counts_ns", self.cluster.plan_ns)

    def _experts(self, layer: PlannedLayer, passes: int) -> None:
        """Forward is one pass over the weights, backward two."""
        if self.fsdp:
            rows = np.full(self.devices, self.settings.tokens * self.model.top_k, dtype=np.int64)
            groups = np.full(self.devices, min(self.model.num_experts, int(rows[0])), dtype=np.int64)
        else:
            rows, groups = layer.plan.device_loads, layer.groups
        per_row = 2 * self.model.expert_weights * 1_000_000 // max(1, self.cluster.flops // 1_000_000)  # 1/1000 ns
        busy = (rows + groups * self.cluster.half_rows) * per_row // 1000 + groups * self.cluster.expert_ns
        self._compute("expert_ns", passes * (busy + self._products(layer) * self.cluster.call_ns))

    def _products(self, layer: PlannedLayer) -> Int64:
        """Grouped products per pass: copies are a stack of their own if owned rows are read in place."""
        return 1 + ((layer.copies > 0) & (self.in_place and not self.fsdp)).astype(np.int64)

    def _move_tokens(self, traffic: Traffic, layer: PlannedLayer) -> None:
        rows = self.settings.tokens * self.model.top_k + (0 if self.fsdp else layer.plan.device_loads)
        self._touch("packing_ns", 2 * rows * self.model.d_model * self.settings.precision.param_bytes)
        if not (self.fsdp or self.alone or traffic.empty):
            self._wait("tokens_ns", self.network.start(TOKENS, traffic, self.now), traffic.work_ns(self.cluster))

    def _gradients(self, layer: PlannedLayer) -> Pending:
        """Pack the gradients of experts that have copies, at their owners too, and send them."""
        size = self.model.expert_weights * self.settings.precision.reduce_bytes
        self._touch("exposed_gradients_ns", 2 * layer.shared * size)
        self._compute("exposed_gradients_ns", layer.shared * self.cluster.copies_ns)
        return self._beside("exposed_gradients_ns", GRADIENTS, layer.gradients)

    def _copies(self, traffic: Traffic) -> Pending:
        """Send copies; rows that are read in place are packed before, casts are packed already."""
        self._touch("exposed_copies_ns", 2 * traffic.sent[:2].sum(axis=0) * self.in_place)
        return self._beside("exposed_copies_ns", COPIES, traffic)

    def _dense_traffic(self, traffic: Traffic) -> Pending:
        return self._beside("exposed_dense_ns", DENSE, traffic)

    # Clocks.

    def _beside(self, name: str, lane: int, traffic: Traffic) -> Pending:
        """Start traffic that runs beside compute, which it slows down by a share of its own time."""
        pending = self.network.start(lane, traffic, self.now)
        self.owed += traffic.work_ns(self.cluster)
        if self.cluster.slowdown_permille and not traffic.empty:
            sides = (traffic.sends[0] + traffic.sends[1], traffic.receives[0] + traffic.receives[1])
            own = np.maximum(*sides)
            self._compute(name, own * self.cluster.slowdown_permille // 1000)
        return pending

    def _arrived(self, name: str, pending: Pending | None) -> None:
        """Wait for traffic beside compute, and finish its work."""
        if pending is not None and not pending.empty:
            self._wait(name, pending)
            self._compute(name, self.owed)
            self.owed = np.zeros_like(self.owed)

    def _wait(self, name: str, pending: Pending, work: Int64 | int = 0) -> None:
        """Wait for traffic; `work` of its own keeps the device busy for so long."""
        self._until(name, pending.done(), work)

    def _until(self, name: str, when: Int64, work: Int64 | int = 0) -> None:
        later = np.maximum(self.now, when)
        self.owed = np.maximum(self.owed - np.maximum(later - self.now - work, 0), 0)
        self.spent[name] += int((later - self.now).sum())
        self.now = later

    def _compute(self, name: str, ns: Int64 | int) -> None:
        self.spent[name] += int(np.broadcast_to(ns, self.now.shape).sum())
        self.now = self.now + ns

    def _touch(self, name: str, num_bytes: Int64 | int) -> None:
        """Read or write so many bytes of memory."""
        self._compute(name, num_bytes * SECOND // self.cluster.memory_bandwidth)
