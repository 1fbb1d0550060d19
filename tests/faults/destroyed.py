"""A training script that saves in the background and destroys its process group at a random moment of the save.

    torchrun --nproc-per-node 2 -m tests.faults.destroyed FOLDER SEED

It resumes from `FOLDER/checkpoint` and checks the weights in it. For each step that it saves, it also writes the
weights to `FOLDER/step-<number>.pt`, for comparison.
"""

from __future__ import annotations

import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import hecate
from hecate.models import GPTMoE, ModelConfig

LONGEST_SECONDS = 0.15
"""Seconds; about as long as a save takes."""


def make() -> tuple[hecate.FSSDP, torch.optim.Optimizer]:
    """A small model with its optimizer."""
    model = GPTMoE(ModelConfig(d_model=16, num_layers=2, num_heads=2, max_length=8))
    model.init_weights(seed=0)
    engine = hecate.fully_shard(model)
    return engine, torch.optim.AdamW(model.parameters(), lr=1e-2)


def resume(engine: hecate.FSSDP, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the checkpoint, if there is one; returns its step."""
    if not (folder / "checkpoint").exists():
        return 0
    step = int(engine.load(folder / "checkpoint", optimizer)["step"])
    expected = torch.load(folder / f"step-{step}.pt")
    different = [name for name, value in engine.full_state_dict().items() if not torch.equal(value, expected[name])]
    if different:
        raise RuntimeError(f"loaded other weights than were saved at step {step}: {different}")
    return step


def train(folder: Path, seed: int) -> None:
    """Make some steps, each saved in the background; then end at a random moment."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    engine, optimizer = make()
    step = resume(engine, optimizer, folder)
    for _ in range(random.Random(seed).randint(1, 3)):
        step += 1
        tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(step * 2 + dist.get_rank()))
        engine.model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        weights = engine.full_state_dict()
        if dist.get_rank() == 0:
            torch.save(weights, folder / f"step-{step}.pt")
        engine.save(folder / "checkpoint", optimizer, async_op=True, extra={"step": step})
    time.sleep(random.Random(seed * 2 + dist.get_rank()).uniform(0, LONGEST_SECONDS))
    dist.destroy_process_group()


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
