"""The paper's own policy: copies by Algorithm 1, owners by Algorithm 2, tokens divided evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hecate.loads.predict import predict
from hecate.placement import Placement
from hecate.planning.materialize import sparse_materialization
from hecate.planning.plan import Calibration, Plan, added, copies_on
from hecate.planning.quota import even_pairs, even_quota
from hecate.planning.reshard import heterogeneous_sharding
from hecate.planning.times import copies_ns, tokens_ns
from hecate.policies.base import LayerSetting, finished, overlap_degree
from hecate.policies.ep import ExpertParallel

__all__ = ["Hecate"]

Int64 = NDArray[np.int64]


class Hecate(ExpertParallel):
    """Follows section 4 of the paper without changes."""

    copies: ClassVar[bool] = True

    def materialize(self, layer: LayerSetting, history: Int64, owners: Int64) -> Placement:
        """Algorithm 1, on the mean loads of the history window."""
        if not len(history):
            return Placement.from_owners(owners, layer.topology.num_devices)
        return self._algorithm_1(layer, predict(history), owners, overlap_degree(layer), layer.memory_slots)

    def calibrate(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Placement:
        """Algorithm 1 again, on the true loads and the free memory slots, if that saves more time than it exposes."""
        return self.weigh(layer, counts, owners, placement).placement

    def weigh(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Calibration:
        """`calibrate`, with what the copies save and cost."""
        slots = layer.memory_slots - int(copies_on(placement, owners).max())
        if not layer.calibrate or slots <= 0:
            return Calibration(placement, placement)
        more = placement | self._algorithm_1(layer, counts.sum(axis=0), owners, placement.num_experts, slots)
        price = copies_ns(layer.cost, added(more, placement), owners, layer.topology)
        tokens = self._busiest(layer, counts, placement) - self._busiest(layer, counts, more)
        saved = tokens_ns(layer.cost, max(0, tokens), layer.topology)
        chosen = more if layer.calibrate == "always" or saved > price else placement
        return Calibration(placement, chosen) if more == placement else Calibration(placement, chosen, saved, price)

    def assign(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Plan:
        """Tokens stay on their device, or are divided evenly over their node's holders, or over all (section 4.4)."""
        holders, quota = even_pairs(counts, placement, layer.topology)
        return finished(layer, owners, placement, quota, holders)

    def reshard(self, layers: Sequence[LayerSetting], loads: Sequence[Int64], owners: Sequence[Int64]) -> list[Int64]:
        """Algorithm 2."""
        return heterogeneous_sharding(loads, layers[0].topology, [overlap_degree(layer) for layer in layers])

    @staticmethod
    def _algorithm_1(layer: LayerSetting, loads: Int64, owners: Int64, degree: int, slots: int) -> Placement:
        return sparse_materialization(
            loads, owners, layer.topology, overlap_degree=degree, memory_slots=min(slots, layer.memory_slots)
        )

    @staticmethod
    def _busiest(layer: LayerSetting, counts: Int64, placement: Placement) -> int:
        """The largest device load if tokens are divided evenly."""
        received = even_quota(counts, placement, layer.topology).sum(axis=0)
        device = np.nonzero(placement.matrix)[1]
        loads = np.zeros(placement.num_devices, dtype=np.int64)
        np.add.at(loads, device, received)
        return int(loads.max())
