"""Trains the examples' tiny model with the Trainer: under FSSDP where torchrun started it, else in one plain process.

Both see the same sequences an optimizer step: two processes accumulate 2 batches each, one process 4.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hecate
from hecate.examples.shared import Text, tiny_model
from hecate.integrations.transformers import FSSDPTrainer
from hecate.ranks.agree import rank_and_world
from hecate.ranks.join import join


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    join()
    world = rank_and_world()[1]
    tiny_model(out / "random")
    model = AutoModelForCausalLM.from_pretrained(out / "random")
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // world,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    text = Text(32, 64)
    if world > 1:
        trainer: Trainer = FSSDPTrainer(hecate.fully_shard(model), args=settings, train_dataset=text)
    else:
        trainer = Trainer(model, args=settings, train_dataset=text)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
