"""Copies after the gate only, for the true loads: what UltraEP (arXiv 2606.04101) and LLEP (arXiv 2601.17111) do."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Placement
from hecate.planning.plan import Plan
from hecate.planning.quota import exact_pairs
from hecate.policies.base import LayerSetting, fewest_copies, finished
from hecate.policies.ep import ExpertParallel

__all__ = ["Exact"]

Int64 = NDArray[np.int64]


class Exact(ExpertParallel):
    """Nothing is planned ahead; all copies are on the critical path. The dial is `max_imbalance`."""

    copies: ClassVar[bool] = True

    def calibrate(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Placement:
        """The fewest copies that reach `max_imbalance`; unlike "balanced", also if they cost more than they save."""
        return fewest_copies(layer, counts, owners, placement, prefer="copies")

    def assign(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Plan:
        """Plan with the quota of smallest maximum device load."""
        holders, quota = exact_pairs(counts, placement, layer.topology)
        return finished(layer, owners, placement, quota, holders)
