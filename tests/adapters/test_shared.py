"""Which models of transformers run their shared experts while tokens travel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hecate
from hecate.adapters.shared import shared_experts_of
from tests.adapters.tiny import known, tiny_model
from tests.workers import Groups

AFTER = ("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "granitemoeshared", "solar_open")
"""Call them after the experts."""
BEFORE = ("qwen2_moe", "qwen3_next")


def _early(model_type: str) -> tuple[int, int]:
    """Layers that run early in the second pass, and all MoE layers."""
    with_shared = {"shared_intermediate_size": 16} if model_type == "granitemoeshared" else {}
    model = tiny_model(model_type, **with_shared)
    engine = hecate.fully_shard(model, config=hecate.FSSDPConfig(max_imbalance=1.0))
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens).loss.backward()
    return len(engine._engine.passes._shared_experts.early()), len(engine._engine.layers)


@pytest.mark.parametrize("model_type", known(AFTER, often=("deepseek_v3", "granitemoeshared")))
def test_after_the_experts(groups: Groups, model_type: str) -> None:
    for early, layers in groups(2).run(_early, model_type):
        assert early == layers > 0


@pytest.mark.parametrize("model_type", known(BEFORE, often=("qwen2_moe",)))
def test_before_the_experts(groups: Groups, model_type: str) -> None:
    for early, _ in groups(2).run(_early, model_type):
        assert early == 0


def _named(*path: str) -> nn.Module:
    """A model with a Linear at each dotted name."""
    model = nn.Module()
    for name in path:
        place = model
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, nn.Linear(1, 1))
    return model


def test_names() -> None:
    model = _named("layers.0.mlp.experts", "layers.0.mlp.shared_expert", "layers.0.mlp.shared_expert_gate")
    found = shared_experts_of("layers.0.mlp.experts", model)
    assert found is model.get_submodule("layers.0.mlp.shared_expert")
    model = _named("layers.0.moe.experts", "layers.0.shared_mlp", "layers.1.moe.experts", "layers.1.moe.router")
    assert shared_experts_of("layers.0.moe.experts", model) is model.get_submodule("layers.0.shared_mlp")
    assert shared_experts_of("layers.1.moe.experts", model) is None
    assert shared_experts_of("experts", _named("experts", "other")) is None
