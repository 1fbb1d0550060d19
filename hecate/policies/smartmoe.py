"""SmartMoE's expert placement (ATC 2023; section 5 of the paper): devices exchange experts every n steps, no copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hecate.policies.base import LayerSetting
from hecate.policies.ep import ExpertParallel

__all__ = ["SmartMoE", "exchanged"]

Int64 = NDArray[np.int64]


class SmartMoE(ExpertParallel):
    """Expert parallelism whose owners change every `reshard_interval` steps; optimizer state moves with the experts."""

    def reshard(self, layers: Sequence[LayerSetting], loads: Sequence[Int64], owners: Sequence[Int64]) -> list[Int64]:
        """Per layer, the owners that `exchanged` finds."""
        devices = layers[0].topology.num_devices
        return [exchanged(load, owner, devices) for load, owner in zip(loads, owners, strict=True)]


def exchanged(loads: Int64, owners: Int64, num_devices: int) -> Int64:
    """New owners of one layer's experts, `[num_experts]`: the hottest first, each to the least loaded device with room.

    A device owns as many of the experts as before. On equal loads an expert stays with its owner, else it goes to the
    device of smallest number. If the largest device load does not become smaller, `owners` are kept.

    Args:
        loads: int64 `[num_experts]`.
        owners: int64 `[num_experts]`.
        num_devices: number of devices.
    """
    room = np.bincount(owners, minlength=num_devices)
    carried = np.zeros(num_devices, dtype=np.int64)
    found = owners.copy()
    for expert in np.argsort(-loads, kind="stable"):
        free = np.flatnonzero(room)
        least = free[carried[free] == carried[free].min()]
        device = owners[expert] if owners[expert] in least else least[0]
        found[expert] = device
        carried[device] += loads[expert]
        room[device] -= 1
    before = np.zeros(num_devices, dtype=np.int64)
    np.add.at(before, owners, loads)
    return found if carried.max() < before.max() else owners.copy()
