"""Trains a tiny model with one of TRL's trainers under FSSDP, saves a checkpoint and resumes; started by torchrun."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hecate
from hecate.examples.shared import say, tiny_model
from hecate.integrations.transformers import FSSDPTrainerMixin
from hecate.ranks.join import join

WORDS = [f"w{i}" for i in range(250)]


class SFT(FSSDPTrainerMixin, trl.SFTTrainer):
    """Supervised fine-tuning."""


class DPO(FSSDPTrainerMixin, trl.DPOTrainer):
    """Direct preference optimization."""


class GRPO(FSSDPTrainerMixin, trl.GRPOTrainer):
    """Group relative policy optimization, which generates on all ranks."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(start: int, length: int = 6) -> str:
    return " ".join(WORDS[(start * 7 + i) % len(WORDS)] for i in range(length))


def trainer(kind: str, engine: hecate.FSSDP, plain: Any, out: Path) -> Any:
    """One of the three."""
    common = {
        "output_dir": str(out),
        "max_steps": 3,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    if kind == "sft":
        data = Dataset.from_dict({"text": [text(i) for i in range(32)]})
        return SFT(
            engine, args=trl.SFTConfig(**common, max_length=16), train_dataset=data, processing_class=tokenizer()
        )
    if kind == "dpo":
        pairs = {"prompt": text, "chosen": lambda i: text(i + 1), "rejected": lambda i: text(i + 2)}
        data = Dataset.from_dict({name: [make(i) for i in range(32)] for name, make in pairs.items()})
        args = trl.DPOConfig(**common, max_length=32)
        return DPO(engine, args=args, train_dataset=data, processing_class=tokenizer(), ref_model=plain)
    data = Dataset.from_dict({"prompt": [text(i) for i in range(32)]})
    args = trl.GRPOConfig(**common, num_generations=2, max_completion_length=4, beta=0.0)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(c))) for c in completions]

    return GRPO(engine, args=args, train_dataset=data, processing_class=tokenizer(), reward_funcs=reward)


def main() -> None:
    """Assert on every rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", required=True)
    arguments = parser.parse_args()
    join()
    tiny_model(arguments.out / "random")
    ends = []
    for resume in (None, str(arguments.out / "run" / "checkpoint-2")):
        model, plain = (AutoModelForCausalLM.from_pretrained(arguments.out / "random") for _ in range(2))
        engine = hecate.fully_shard(model)
        made = trainer(arguments.kind, engine, plain, arguments.out / "run")
        made.train(resume_from_checkpoint=resume)
        ends.append(engine.full_state_dict())
    start = plain.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in ends[0].items())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    say(f"{arguments.kind} resumed bit-identically")


if __name__ == "__main__":
    main()
