"""The default policy: robust copies while communication is hidden, otherwise only copies that pay; an exact quota."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Placement
from hecate.planning.calibrate import added, copies_ns, few_copies, parts_per_million, target_load, tokens_ns
from hecate.planning.limits import CopyLimits
from hecate.planning.materialize import robust_copies
from hecate.planning.plan import Plan
from hecate.planning.quota import balanced, exact_pairs, min_max_loads
from hecate.planning.reshard import few_moves
from hecate.policies.base import LayerSetting, finished, overlap_degree

__all__ = ["Balanced"]

Int64 = NDArray[np.int64]


class Balanced:
    """Plans copies before the step, off the critical path, and assigns tokens exactly (docs/design.md, decision 6)."""

    def materialize(self, layer: LayerSetting, history: Int64, owners: Int64) -> Placement:
        """As many robust copies as can be sent behind other work; if not even one can, as many as pay off.

        If nothing at all is hidden, planning early gains nothing, so copies are left to `calibrate` (unless it is off):
        once the true loads are known, fewer copies suffice.
        """
        slots = min(layer.memory_slots, overlap_degree(layer, crosses_node=False))
        if slots:
            foreign = overlap_degree(layer) * layer.topology.devices_per_node
            return robust_copies(history, owners, layer.topology, CopyLimits.of(layer.topology, slots, foreign))
        start = Placement.from_owners(owners, layer.topology.num_devices)
        if layer.calibrate and not layer.cost.hidden_ns(layer.tokens_per_device):
            return start
        candidates = [start]
        for slots in range(1, layer.memory_slots + 1):
            candidates.append(robust_copies(history, owners, layer.topology, CopyLimits.of(layer.topology, slots)))
            if (candidates[-1] - start).matrix.sum(axis=0).max() < slots:
                break  # no device used all of its slots, so more of them change nothing
        return max(candidates, key=lambda p: self._expected_gain(layer, history, owners, start, p))

    def calibrate(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Placement:
        """The fewest further copies that reach `max_imbalance`, if they pay off by the cost model."""
        dial = parts_per_million(layer.max_imbalance)
        if not layer.calibrate or balanced(counts, placement, dial):
            return placement
        loads = counts.sum(axis=0)
        devices = layer.topology.num_devices
        target = target_load(int(loads.sum()), devices, dial)
        used = placement.matrix.sum(axis=0) - np.bincount(owners, minlength=devices)
        limits = CopyLimits.of(layer.topology, layer.memory_slots - used)
        more = few_copies(loads, placement, layer.topology, limits, target=target, prefer="crossings")
        if more == placement or layer.calibrate == "always":
            return more
        saved = int(min_max_loads(loads[None], placement)[0] - min_max_loads(loads[None], more)[0])
        price = copies_ns(layer.cost, added(more, placement), owners, layer.topology)
        return more if tokens_ns(layer.cost, saved, layer.topology) > price else placement

    def assign(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Plan:
        """Plan with the quota of smallest maximum device load."""
        holders, quota = exact_pairs(counts, placement, layer.topology)
        return finished(layer, owners, placement, quota, holders)

    def reshard(self, layers: Sequence[LayerSetting], loads: Sequence[Int64], owners: Sequence[Int64]) -> list[Int64]:
        """Owners as balanced as those of Algorithm 2, with fewer experts moved."""
        return few_moves(loads, owners, layers[0].topology, [overlap_degree(layer) for layer in layers])

    @staticmethod
    def _expected_gain(
        layer: LayerSetting, history: Int64, owners: Int64, start: Placement, placement: Placement
    ) -> int:
        """Nanoseconds per step that `placement` would have saved over the history, minus its copies' exposed time."""
        if not len(history):
            return 0
        loads = history.sum(axis=1)
        saved = int((min_max_loads(loads, start) - min_max_loads(loads, placement)).sum()) // len(loads)
        price = copies_ns(layer.cost, added(placement, start), owners, layer.topology)
        return tokens_ns(layer.cost, saved, layer.topology) - price
