"""`memory_slots="auto"`: what training takes is reserved first, and all ranks lower their slots together."""

from __future__ import annotations

from unittest.mock import patch

import torch

from tests.runtime.helpers import Pair, net, rank, square_loss
from tests.workers import Groups

MEMORY = "hecate.runtime.experts.slots.free_memory"
COPY = (8 * 16 + 16 * 8) * 8
"""Bytes of one copy of an expert of `net`."""
LAYERS = 2


def _slots(pair: Pair) -> list[int]:
    return [layer.experts.memory_slots for layer in pair.engine._engine.layers]


def _auto(free: int, **changes: object) -> Pair:
    with patch(MEMORY, lambda *_: free):
        return Pair(net(), memory_slots="auto", memory_share=0.5, **changes)


def _reserve() -> None:
    """Per rank: 2 layers of 2 experts, half of the dense part; 8 bytes of gradient and two float32 per element."""
    dense = sum(p.numel() for name, p in net().named_parameters() if ".experts." not in name)
    taken = 16 * LAYERS * 2 * (COPY // 8) + 16 * dense // 2
    for copies, expected in ((0, 0), (1, 1), (2, 2), (9, 2)):
        pair = _auto(taken + 2 * LAYERS * copies * COPY)
        assert _slots(pair) == [expected] * LAYERS, (copies, _slots(pair))
        pair.engine.close()


def test_optimizer_state_and_gradients_are_reserved(groups: Groups) -> None:
    groups(2).run(_reserve)


def _lower(rematerialize: bool) -> None:
    pair = _auto(10**9, rematerialize=rematerialize)
    optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2))
    plenty, one_each = 10**9, 2 * LAYERS * COPY
    # (free memory of rank 0, of rank 1), and the slots of all ranks in that step
    for seed, (free, expected) in enumerate(
        [((0, 0), 2), ((plenty, plenty), 2), ((plenty, one_each), 1), ((plenty, plenty), 1), ((0, 0), 1)]
    ):
        memory, held = pair.engine._engine._shared, pair.engine._parts.copies_memory.num_bytes
        with patch(MEMORY, lambda *_, free=free, held=held: free[rank()] - held):
            pair.backward(square_loss(seed))
        assert _slots(pair) == [expected] * LAYERS, seed
        if memory is not None:
            assert memory.num_bytes == 2 * expected * COPY
        pair.check_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pair.check_state(rtol=1e-8)


def test_ranks_lower_slots_together_and_never_raise_them(groups: Groups) -> None:
    for rematerialize in (False, True):
        groups(2).run(_lower, rematerialize)
