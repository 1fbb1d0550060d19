"""FlexMoE's replicas (arXiv 2304.03946; section 5 of the paper): every n steps copies are added, removed and moved.

They stay in between, with optimizer state of their own, and are kept in step with their owners.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Placement
from hecate.planning.calibrate import parts_per_million, target_load
from hecate.policies.base import LayerSetting
from hecate.policies.ep import ExpertParallel

__all__ = ["FlexMoE", "adjusted"]

Int64 = NDArray[np.int64]
Held = NDArray[np.bool_]

UNIT = 1_000_000
"""Shares of an expert's load are integers, in parts of this of a token."""


class FlexMoE(ExpertParallel):
    """Copies change every `reshard_interval` steps, by the loads since the last time. A device computes its own tokens
    of an expert that it holds; others are divided evenly. Unlike FlexMoE, the cost of a change is not weighed: copies
    are added as long as they lower the largest device load.
    """

    copies: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    def keep(self, layer: LayerSetting, loads: Int64, owners: Int64, kept: Placement) -> Placement:
        """Changes by `adjusted` until `max_imbalance` is reached."""
        dial = parts_per_million(layer.max_imbalance)
        target = target_load(int(loads.sum()), layer.topology.num_devices, dial)
        return adjusted(loads, owners, kept, layer.memory_slots, target)


def adjusted(loads: Int64, owners: Int64, kept: Placement, slots: int, target: int) -> Placement:
    """`kept` with copies added, moved and removed one at a time, or if that is better, copies made from none.

    As long as the largest device load is above `target`: of the experts on that device, the one with the largest load
    per holder gets a copy on the least loaded device with a free slot, or in place of a copy there. If that makes the
    largest load no smaller, it ends. Then copies without which it is no larger than before, or than `target`, go, those
    with the smallest load per holder first. Of two results that are equally good, the one with fewer new copies is
    taken.

    Args:
        loads: int64 `[num_experts]`, tokens; an expert's are divided evenly among its holders.
        owners: int64 `[num_experts]`.
        kept: owners and copies before.
        slots: most copies that a device may hold.
        target: device load, in tokens, that is good enough.
    """
    owned = Placement.from_owners(owners, kept.num_devices).matrix
    found = [
        _without_needless(loads, _grown(loads, held, owned, slots, target), owned, target)
        for held in (kept.matrix, owned)
    ]

    def badness(held: Held) -> tuple[int, int]:
        return max(int(_device_loads(loads, held).max()), target * UNIT), int((held & ~kept.matrix).sum())

    return Placement(min(found, key=badness))


def _grown(loads: Int64, held: Held, owned: Held, slots: int, target: int) -> Held:
    """`held` with copies added or moved as long as that lowers the largest device load and it is above `target`."""
    for _ in range(held.size):
        most = _device_loads(loads, held).max()
        better = _with_one_more(loads, held, owned, slots) if most > target * UNIT else None
        if better is None or _device_loads(loads, better).max() >= most:
            break
        held = better
    return held


def _share(loads: Int64, held: Held) -> Int64:
    """Load of each holder of an expert, `[num_experts]`, in 1 / `UNIT` tokens."""
    return loads * UNIT // held.sum(axis=1)


def _device_loads(loads: Int64, held: Held) -> Int64:
    return _share(loads, held) @ held.astype(np.int64)


def _with_one_more(loads: Int64, held: Held, owned: Held, slots: int) -> Held | None:
    """`held` with a further copy of the hottest expert of the busiest device; None if no device has room for it."""
    by_device, share = _device_loads(loads, held), _share(loads, held)
    expert = int(np.where(held[:, by_device.argmax()], share, -1).argmax())
    for device in np.argsort(by_device, kind="stable"):
        if held[expert, device]:
            continue
        more, copies = held.copy(), held[:, device] & ~owned[:, device]
        if copies.sum() >= slots:
            replaced = int(np.where(copies, share, share.max() + 1).argmin())
            if not copies.any() or share[replaced] >= share[expert]:
                continue
            more[replaced, device] = False
        more[expert, device] = True
        return more
    return None


def _without_needless(loads: Int64, held: Held, owned: Held, target: int) -> Held:
    """`held` without copies that the largest device load does not need."""
    most = max(int(_device_loads(loads, held).max()), target * UNIT)
    before: Held | None = None
    while before is not held:  # without one copy, another may become needless
        before = held
        experts, devices = np.nonzero(held & ~owned)
        for i in np.argsort(_share(loads, held)[experts], kind="stable"):
            less = held.copy()
            less[experts[i], devices[i]] = False
            held = less if _device_loads(loads, less).max() <= most else held
    return held
