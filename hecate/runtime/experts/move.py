"""Re-sharding: moves the rows of experts (weights, gradients, optimizer state) between the slots of their owners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hecate.collectives.moves import moves_between
from hecate.collectives.transport import Transport
from hecate.placement import Placement
from hecate.runtime.experts.pool import ExpertPool

__all__ = ["move"]


def move(
    pool: ExpertPool, owners: Sequence[NDArray[np.int64]], tensors: Sequence[Tensor], transport: Transport
) -> None:
    """Give `pool` new owners and permute the rows of `tensors` accordingly, in place. Collective.

    Args:
        pool: gets the new owners.
        owners: per layer, int64 `[num_experts]`, the new owners.
        tensors: `[slots, ...]` each, the same number and order on every rank.
        transport: between the devices of the pool.
    """
    before, after = (Placement.from_owners(np.concatenate(o), pool.num_devices) for o in (pool.owners, list(owners)))
    if before == after:
        return
    moves = moves_between(before, after)
    old, new = before.held_by(pool.rank).tolist(), after.held_by(pool.rank).tolist()
    slot_before, slot_after = ({expert: slot for slot, expert in enumerate(held)} for held in (old, new))
    arriving = [e for e in new if e not in slot_before]
    kept = [(slot_before[e], slot_after[e]) for e in new if e in slot_before]
    for tensor in tensors:
        rows = tensor.view(pool.slots, -1)
        received = dict(zip(arriving, rows.new_empty(len(arriving), rows.shape[1]), strict=True))
        transport.gather(moves, dict(zip(old, rows, strict=False)), received).wait()
        _shift(rows, kept)
        for expert, row in received.items():
            rows[slot_after[expert]].copy_(row)
        rows[len(new) :] = 0
    pool.set_owners(owners)


def _shift(rows: Tensor, kept: Sequence[tuple[int, int]]) -> None:
    """Move rows to other slots in place.

    Slots are sorted by expert before and after, so rows keep their relative order. Moving rows to lower slots in
    ascending order, then rows to higher slots in descending order, overwrites no row that has yet to move.

    Args:
        rows: `[slots, n]`.
        kept: (slot before, slot after) of the experts that stay on this device, ascending.
    """
    for source, target in kept:
        if target < source:
            rows[target].copy_(rows[source])
    for source, target in reversed(kept):
        if target > source:
            rows[target].copy_(rows[source])
