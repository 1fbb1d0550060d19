"""All policies train alike: they change where tokens are computed, and not what."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

import hecate
from hecate.config import PolicyName
from hecate.models.gpt import GPTMoE
from tests.bench import device
from tests.runtime.helpers import SMALL, config, tokens
from tests.workers import Groups


def _train(policy: str, steps: int = 4) -> dict[str, Any]:
    """Losses of all steps, and what the policy did in them."""
    model = GPTMoE(SMALL)
    model.init_weights(seed=0)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.gate.weight.mul_(40)
    engine = hecate.fully_shard(model.to(device()), config=config(policy, reshard_interval=2, memory_slots=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, Any] = {"losses": [], "copies": 0, "owners": [pool.flat_rows() for pool in engine.pools]}
    for step in range(steps):
        loss = model(*tokens(step, dist.get_rank())).loss
        loss.backward()
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        found["losses"].append(float(mean) / dist.get_world_size())
        found["copies"] += sum(layer["copies"] for layer in engine.stats()["layers"])
    found["moved"] = any((a != b.flat_rows()).any() for a, b in zip(found["owners"], engine.pools, strict=True))
    found["slots"] = engine.stats()["memory_bytes"]["copies"]
    engine.close()
    return found


def _all_policies() -> dict[str, dict[str, Any]]:
    return {policy: _train(policy) for policy in get_args(PolicyName)}


def test_losses_are_those_of_ep(groups: Groups) -> None:
    ranks = groups(3).run(_all_policies)
    found = ranks[0]
    for policy, run in found.items():
        assert run["losses"] == pytest.approx(found["ep"]["losses"], rel=1e-6), policy
    moved = {policy for policy in found if any(rank[policy]["moved"] for rank in ranks)}
    copying = {policy for policy, run in found.items() if run["copies"]}
    assert copying == {"balanced", "hecate", "fastermoe", "flexmoe", "exact"}
    assert {"hecate", "smartmoe"} <= moved <= {"balanced", "hecate", "smartmoe"}
    kept = {policy for policy in found if any(rank[policy]["slots"] for rank in ranks)}
    assert kept == copying  # no memory is set aside for copies that are never made
