"""Fine-tune a transformers MoE with transformers' Trainer.

    python -m hecate.examples.finetune_trainer --out tuned
    torchrun --nproc-per-node 2 -m hecate.examples.finetune_trainer --out tuned

`--resume` continues from a checkpoint of an earlier run. For TRL's trainers see `hecate.integrations.transformers`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import hecate
from hecate.examples.shared import Text, say, tiny_model
from hecate.integrations.transformers import FSSDPTrainer
from hecate.ranks.join import join


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Fine-tune a tiny transformers MoE with the Trainer under FSSDP.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resume", help="a checkpoint-... folder of an earlier run")
    arguments = parser.parse_args()
    device = join()
    tiny_model(arguments.out / "random")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(arguments.out / "random"), dtype=torch.float32
        )
    engine = hecate.fully_shard(model)
    engine.load_pretrained(arguments.out / "random")
    settings = TrainingArguments(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=arguments.steps,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    text = Text(128, 4096)
    trainer = FSSDPTrainer(engine, args=settings, train_dataset=text)
    result = trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()
    say(f"saved to {arguments.out}; mean loss {result.training_loss:.4f}")


if __name__ == "__main__":
    main()
