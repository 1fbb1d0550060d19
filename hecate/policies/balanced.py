"""The default policy: robust copies while communication is hidden, otherwise only copies that pay; an exact quota."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Placement
from hecate.planning.calibrate import parts_per_million, target_load
from hecate.planning.limits import CopyLimits
from hecate.planning.materialize import robust_copies
from hecate.planning.nearby import NodeCopies
from hecate.planning.plan import Calibration, Plan, added
from hecate.planning.quota import exact_pairs, min_max_loads
from hecate.planning.reshard import few_moves
from hecate.planning.times import copies_ns, tokens_ns
from hecate.policies.base import LayerSetting, fewest_copies, finished, node_entries, overlap_degree
from hecate.policies.ep import ExpertParallel

__all__ = ["Balanced", "waits_for_the_gate"]

HALF_HIDDEN = 500
"""In 1/1000. Robust copies for unknown loads are about twice as many as the fewest for known ones, so making them early
costs less time only if at least half of it is hidden."""

Int64 = NDArray[np.int64]


class Balanced(ExpertParallel):
    """Plans copies before the step, off the critical path, and assigns tokens exactly (docs/design.md, decision 6)."""

    copies: ClassVar[bool] = True

    def materialize(self, layer: LayerSetting, history: Int64, owners: Int64) -> Placement:
        """As many robust copies as can be sent behind other work; if not even one can, as many as pay off.

        If nothing is hidden, or little (`waits_for_the_gate`), planning early gains nothing, so copies are left to
        `calibrate` (unless it is off): once the true loads are known, fewer copies suffice.
        """
        start = Placement.from_owners(owners, layer.topology.num_devices)
        if waits_for_the_gate(layer):
            return start
        slots = min(layer.memory_slots, overlap_degree(layer, crosses_node=False))
        if slots:
            return self._hidden_copies(layer, history, owners, slots)
        if layer.calibrate and not layer.cost.hidden_ns(layer.tokens_per_device):
            return start
        candidates = [start]
        for slots in range(1, layer.memory_slots + 1):
            candidates.append(robust_copies(history, owners, layer.topology, CopyLimits.of(layer.topology, slots)))
            if (candidates[-1] - start).matrix.sum(axis=0).max() < slots:
                break  # no device used all of its slots, so more of them change nothing
        return max(candidates, key=lambda p: self._expected_gain(layer, history, owners, start, p))

    @staticmethod
    def _hidden_copies(layer: LayerSetting, history: Int64, owners: Int64, slots: int) -> Placement:
        """Copies in up to `slots` slots per device; none if no past step needed any.

        Other work hides them, but for those between nodes that keep enough tokens in a node to pay without that.
        """
        topology, start = layer.topology, Placement.from_owners(owners, layer.topology.num_devices)
        if not len(history):
            return start
        loads, dial = history.sum(axis=1), parts_per_million(layer.max_imbalance)
        targets = [target_load(total, topology.num_devices, dial) for total in loads.sum(axis=1).tolist()]
        if topology.num_nodes > 1:
            return NodeCopies(history, owners, topology, layer.cost, slots, node_entries(layer), targets[-1]).best()
        if (min_max_loads(loads, start) <= targets).all():
            return start
        return robust_copies(history, owners, topology, CopyLimits.of(topology, slots))

    def calibrate(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Placement:
        """The fewest further copies that reach `max_imbalance`, if they pay off by the cost model."""
        return self.weigh(layer, counts, owners, placement).placement

    def weigh(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Calibration:
        """`calibrate`, with what the copies save and cost."""
        more = fewest_copies(layer, counts, owners, placement, prefer="crossings")
        if more == placement or layer.calibrate == "always":
            return Calibration(placement, more)
        loads = counts.sum(axis=0)
        tokens = int(min_max_loads(loads[None], placement)[0] - min_max_loads(loads[None], more)[0])
        price = copies_ns(layer.cost, added(more, placement), owners, layer.topology)
        saved = tokens_ns(layer.cost, tokens, layer.topology)
        return Calibration(placement, more if saved > price else placement, saved, price)

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


def waits_for_the_gate(layer: LayerSetting) -> bool:
    """Whether no copies are made early: `calibrate` may make them, and the cost model hides less than half of a copy.

    A configured overlap degree says what is hidden, instead of the cost model.
    """
    little = layer.overlap_degree == "auto" and layer.cost.model.hidden_permille < HALF_HIDDEN
    return bool(layer.calibrate) and little
