"""FasterMoE's shadowing (PPoPP 2022; section 5 of the paper): after the gate, hot experts go to every device."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Placement
from hecate.planning.quota import even_pairs, sent_rows
from hecate.policies.base import LayerSetting
from hecate.policies.ep import ExpertParallel

__all__ = ["FasterMoE"]

Int64 = NDArray[np.int64]


class FasterMoE(ExpertParallel):
    """Copies on the critical path, to all devices or none. A device computes its own tokens of a copied expert."""

    copies: ClassVar[bool] = True

    def calibrate(self, layer: LayerSetting, counts: Int64, owners: Int64, placement: Placement) -> Placement:
        """The r hottest experts on all devices, r <= `memory_slots` with the shortest predicted time.

        With `calibrate="always"`, r is as large as the slots allow; with False it is 0.
        """
        loads = counts.sum(axis=0)
        hottest = np.argsort(-loads, kind="stable")[: layer.memory_slots]
        hottest = hottest[loads[hottest] > 0]
        choices = [_everywhere(placement, hottest[:r]) for r in range(len(hottest) + 1)]
        if layer.calibrate == "always":
            return choices[-1]
        if not layer.calibrate:
            return placement
        times = [_layer_ns(layer, counts, choice) + r * _broadcast_ns(layer) for r, choice in enumerate(choices)]
        return choices[times.index(min(times))]


def _everywhere(placement: Placement, experts: Int64) -> Placement:
    matrix = placement.matrix.copy()
    matrix[experts] = True
    return Placement(matrix)


def _layer_ns(layer: LayerSetting, counts: Int64, placement: Placement) -> int:
    """Nanoseconds of the layer, forward and backward: compute of the busiest device, and four exchanges of tokens.

    An exchange takes as long as the device that sends or receives most tokens.
    """
    holders, quota = even_pairs(counts, placement, layer.topology)
    sent = sent_rows(holders, quota, placement.num_devices)
    computed = int(sent.sum(axis=0).max())
    np.fill_diagonal(sent, 0)
    travel = int(max(sent.sum(axis=0).max(), sent.sum(axis=1).max()))
    crosses = layer.topology.num_nodes > 1
    return layer.cost.token_ns(computed) + 4 * layer.cost.model.transfer_ns(travel * layer.cost.token_bytes, crosses)


def _broadcast_ns(layer: LayerSetting) -> int:
    """Nanoseconds to copy one expert to all devices and to sum its gradients."""
    cost, crosses = layer.cost, layer.topology.num_nodes > 1
    return cost.model.transfer_ns(cost.expert_bytes, crosses) + cost.model.transfer_ns(cost.gradient_bytes, crosses)
