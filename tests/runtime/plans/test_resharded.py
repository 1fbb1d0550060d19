"""`stats()` says what re-sharding has moved before a step: experts that changed owners, with their optimizer state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

import hecate
from hecate.models.gpt import GPTMoE
from tests.checkpoint.runs import BALANCED, TINY
from tests.workers import Groups

STEPS = 5


def _moved() -> tuple[list[dict[str, int]], list[int], int]:
    """Per step, what `stats()` says; rows of this rank that changed at each re-sharding; bytes of a row."""
    torch.manual_seed(0)
    model = GPTMoE(TINY).double()
    with torch.no_grad():
        for block in model.blocks:
            block.moe.gate.weight.mul_(20)
    engine = hecate.fully_shard(model, None, replace(BALANCED, reshard_interval=2))
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1, momentum=0.9)
    told: list[int] = []
    engine.on_reshard(lambda name, old, new: told.append(len(np.setdiff1d(new, old))))
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(31, (2, 13), generator=generator)
        engine.model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(engine.stats()["resharded"])
    weights = sum(p.to_local().nbytes for p in engine.pools[0].parameters.values())  # type: ignore[attr-defined]
    return found, told, 2 * weights // engine.pools[0].slots  # weights and momentum


def test_experts_and_bytes_that_moved_are_reported(groups: Groups) -> None:
    (found, told, row), (others, told_others, _) = groups(2).run(_moved)
    assert found == others
    arrived = [mine + theirs for mine, theirs in zip(told, told_others, strict=True)]
    assert arrived
    assert [moved["experts"] for moved in found if moved["experts"]] == arrived
    assert all(moved["bytes"] == moved["experts"] * row for moved in found)
    assert found[0] == found[1] == found[3] == {"experts": 0, "bytes": 0}
