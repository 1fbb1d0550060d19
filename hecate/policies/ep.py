"""Plain expert parallelism: nothing is copied, nothing moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Placement
from hecate.planning.plan import Plan
from hecate.planning.quota import even_pairs
from hecate.policies.base import LayerSetting, finished

__all__ = ["ExpertParallel"]

Int64 = NDArray[np.int64]


class ExpertParallel:
    """Every token is sent to the owner of its expert. Other policies derive from it and replace what they change."""

    copies: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    def materialize(self, layer: LayerSetting, history: Int64, owners: Int64) -> Placement:
        """The owners only, no copies."""
        return Placement.from_owners(owners, layer.topology.num_devices)

    def calibrate(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Placement:
        """`placement`, unchanged."""
        return placement

    def assign(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Plan:
        """Tokens stay on a device that holds their expert; others go to the owner."""
        holders, quota = even_pairs(counts, placement, layer.topology)
        return finished(layer, owners, placement, quota, holders)

    def reshard(self, layers: Sequence[LayerSetting], loads: Sequence[Int64], owners: Sequence[Int64]) -> list[Int64]:
        """`owners`, unchanged."""
        return [owner.copy() for owner in owners]

    def keep(self, layer: LayerSetting, loads: Int64, owners: Int64, kept: Placement) -> Placement:
        """`kept`, unchanged: there are none."""
        return kept
