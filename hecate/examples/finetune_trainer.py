"""Fine-tune a transformers MoE with transformers' Trainer.

    python -m hecate.examples.finetune_trainer --out tuned
    torchrun --nproc-per-node 2 -m hecate.examples.finetune_trainer --out tuned

The Trainer would wrap the model in DistributedDataParallel; `FSSDPTrainer` prevents that with public methods of
transformers and accelerate. The Trainer's own `resume_from_checkpoint` does not work, because it saves only rank 0's
optimizer state: set `save_only_model=True` and use `engine.save` and `engine.load`, as `SaveState` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hecate
from hecate.examples.shared import Text, say, tiny_model
from hecate.ranks.join import join

STATE = "fssdp"
"""Folder inside each of the Trainer's checkpoints."""


class FSSDPTrainer(Trainer):
    """The Trainer for a model under FSSDP.

    Args:
        engine: result of `hecate.fully_shard`, with initialized parameters.
        kwargs: arguments of `Trainer`, without `model`.
    """

    def __init__(self, engine: hecate.FSSDP, **kwargs: Any) -> None:
        self.engine = engine
        super().__init__(model=engine.model, **kwargs)
        self.add_callback(SaveState(engine))

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator as usual, but keep it from wrapping the model, and clip gradients with the engine."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            return prepare(model, device_placement=False, evaluation_mode=True)

        def clip_grad_norm_(parameters: object, max_norm: float, norm_type: float = 2) -> Tensor:
            return self.engine.clip_grad_norm_(max_norm)

        self.accelerator.prepare_model = prepare_model
        self.accelerator.clip_grad_norm_ = clip_grad_norm_

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save in the format that `from_pretrained` loads."""
        self.engine.save_pretrained(str(output_dir or self.args.output_dir))


class SaveState(TrainerCallback):
    """Saves weights, optimizer state and load history in each checkpoint of the Trainer, for `engine.load`."""

    def __init__(self, engine: hecate.FSSDP) -> None:
        self._engine = engine

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Called on every rank."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE
        self._engine.save(folder, kwargs["optimizer"].optimizer, extra={"step": state.global_step})


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Fine-tune a tiny transformers MoE with the Trainer under FSSDP.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=50)
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
        save_only_model=True,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    text = Text(128, 4096)
    trainer = FSSDPTrainer(engine, args=settings, train_dataset=text)
    result = trainer.train()
    trainer.save_model()
    say(f"saved to {arguments.out}; mean loss {result.training_loss:.4f}")


if __name__ == "__main__":
    main()
