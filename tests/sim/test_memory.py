"""Memory by kind equals what an engine measures, within 5 %."""

from __future__ import annotations

import pytest
import torch

import hecate
from hecate.models import GPTMoE, ModelConfig
from hecate.sim.memory import memory_of
from hecate.sim.settings import Precision, Settings
from tests.runtime.helpers import settings
from tests.sim.small import cluster, model
from tests.workers import Groups

D, LAYERS, EXPERTS, VOCABULARY = 64, 3, 8, 256


def measured(rematerialize: bool) -> None:
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=D, num_layers=LAYERS, num_heads=2, num_experts=EXPERTS, max_length=32
    )
    torch.manual_seed(0)
    engine = hecate.fully_shard(GPTMoE(config), config=settings(rematerialize=rematerialize, overlap_degree=2))
    optimizer = torch.optim.AdamW(engine.model.parameters())
    for _ in range(3):
        tokens = torch.randint(VOCABULARY, (2, 33))
        engine.model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = engine.stats()["memory_bytes"]
    shape = model(
        num_layers=LAYERS,
        d_model=D,
        num_experts=EXPERTS,
        expert_weights=4 * D * D,
        dense_weights=4 * D * D + EXPERTS * D + 4 * D,
        outer_weights=2 * VOCABULARY * D + 2 * D,
        head_weights=VOCABULARY * D,
    )
    copies = max(int(p.matrix.sum(axis=0).max()) - EXPERTS // 2 for p in _placements(engine))
    how = Settings(tokens=64, memory_slots=2, rematerialize=rematerialize, precision=Precision(4, 4, 4, 2))
    expected = memory_of(shape, cluster(2, 2), how, copies, 1.0, EXPERTS // 2)
    for kind in ("owned", "optimizer", "gradients"):
        assert found[kind] == pytest.approx(getattr(expected, kind), rel=0.05), kind
    assert copies > 0
    assert found["copies"] == pytest.approx(expected.copies, rel=0.05)


def _placements(engine: hecate.FSSDP) -> list[hecate.Placement]:
    tokens = torch.randint(VOCABULARY, (2, 33))
    engine.model(tokens[:, :-1], tokens[:, 1:])
    placements = engine._engine._placements
    assert placements is not None
    return placements


@pytest.mark.parametrize("rematerialize", [False, True])
def test_equals_what_is_measured(groups: Groups, rematerialize: bool) -> None:
    groups(2).run(measured, rematerialize)
