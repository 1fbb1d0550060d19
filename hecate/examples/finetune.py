"""Fine-tune a transformers MoE in a custom training loop.

    python -m hecate.examples.finetune --out tuned
    torchrun --nproc-per-node 2 -m hecate.examples.finetune --model FOLDER --out tuned

FOLDER has the format of `save_pretrained` or the hub; the model needs a vocabulary of at least 256 tokens. Without
--model, a tiny random model is made. Each process holds only its share of the model, plus one expert while loading or
saving.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM

import hecate
from hecate.examples.shared import Text, say, tiny_model
from hecate.ranks.agree import rank_and_world
from hecate.ranks.join import join


def main() -> None:
    """Train and save."""
    arguments = _arguments()
    device = join()
    folder = arguments.model or arguments.out / "random"
    if arguments.model is None:
        tiny_model(folder)

    with torch.device("meta"):  # allocates no memory
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    engine = hecate.fully_shard(model)
    engine.load_pretrained(folder)

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, arguments.steps)
    for step, batch in enumerate(_batches(arguments)):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        norm = engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 10 == 0 or step == arguments.steps - 1:
            say(f"step {step}: loss {loss.item():.4f}, gradient norm {norm.item():.3f}")

    engine.save_pretrained(arguments.out)  # AutoModelForCausalLM.from_pretrained can load it
    say(f"saved to {arguments.out}")


def _batches(arguments: argparse.Namespace) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches of this rank's share of the text; the same number on every rank."""
    rank, world = rank_and_world()
    text = Text(arguments.length, arguments.steps * arguments.batch * world)
    sampler: DistributedSampler[dict[str, torch.Tensor]] = DistributedSampler(text, world, rank, seed=0)
    return DataLoader(text, arguments.batch, sampler=sampler)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a transformers MoE under FSSDP.")
    parser.add_argument("--model", type=Path, help="folder to start from; default: a tiny random model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="sequences of each rank a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
