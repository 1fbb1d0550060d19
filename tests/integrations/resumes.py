"""Trains with the Trainer, resumes from its checkpoint, and loads its best model; started by torchrun."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

import hecate
from hecate.examples.shared import Text, say, tiny_model
from hecate.integrations.transformers import FSSDPTrainer
from hecate.ranks.join import join

STEPS = 4


class Weights(TrainerCallback):
    """Keeps the weights at the end of each step."""

    def __init__(self, engine: hecate.FSSDP) -> None:
        self._engine = engine
        self.by_step: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Called on every rank."""
        self.by_step[state.global_step] = self._engine.full_state_dict()


def trained(out: Path, resume: str | None, best: bool) -> tuple[Weights, FSSDPTrainer]:
    """Train the tiny model, with re-sharding and an evaluation after every step."""
    model = AutoModelForCausalLM.from_pretrained(out / "random", attention_dropout=0.1)
    engine = hecate.fully_shard(model, None, hecate.FSSDPConfig(reshard_interval=2))
    settings = TrainingArguments(
        output_dir=str(out / ("best" if best else "run")),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-3,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps" if best else "no",
        load_best_model_at_end=best,
        greater_is_better=True,  # so that it is not the last
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = FSSDPTrainer(engine, args=settings, train_dataset=Text(32, 64), eval_dataset=Text(32, 8))
    weights = Weights(engine)
    trainer.add_callback(weights)
    trainer.train(resume_from_checkpoint=resume)
    return weights, trainer


def main() -> None:
    """Assert on every rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    join()
    tiny_model(out / "random")
    whole, _ = trained(out, None, best=False)
    resumed, _ = trained(out, str(out / "run" / "checkpoint-2"), best=False)
    assert sorted(whole.by_step) == [1, 2, 3, 4]
    assert sorted(resumed.by_step) == [3, 4]
    for step, state in resumed.by_step.items():
        for name, value in state.items():
            assert torch.equal(value, whole.by_step[step][name]), f"step {step}: {name}"
    say("resumed bit-identically")
    best, trainer = trained(out, None, best=True)
    number = int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])
    assert number < STEPS
    for name, value in trainer.engine.full_state_dict().items():
        assert torch.equal(value, best.by_step[number][name]), name
    say("loaded the best model")


if __name__ == "__main__":
    main()
