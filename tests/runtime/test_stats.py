"""`FSSDP.stats()` measures device memory in the first steps of a process, also if the run was resumed."""

from __future__ import annotations

from pathlib import Path

import torch

import hecate
from hecate.models import GPTMoE, ModelConfig


def run(checkpoint: Path | None, steps: int) -> tuple[hecate.FSSDP, torch.optim.Optimizer]:
    engine = hecate.fully_shard(GPTMoE(ModelConfig(d_model=16, num_layers=1, num_heads=2, max_length=8)))
    optimizer = torch.optim.AdamW(engine.model.parameters())
    if checkpoint is not None:
        engine.load(checkpoint, optimizer)
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        engine.model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine, optimizer


def test_memory_is_measured_after_loading_a_later_step(tmp_path: Path) -> None:
    engine, optimizer = run(None, steps=5)
    engine.save(tmp_path / "checkpoint", optimizer)
    expected = engine.stats()["memory_bytes"]
    assert expected["optimizer"] >= 2 * expected["owned"] > 0
    assert expected["gradients"] == expected["owned"]
    assert run(tmp_path / "checkpoint", steps=1)[0].stats()["memory_bytes"] == expected
    # A run that was complete but for its summary.
    loaded = run(tmp_path / "checkpoint", steps=0)[0].stats()["memory_bytes"]
    assert loaded == expected | {"gradients": 0}
