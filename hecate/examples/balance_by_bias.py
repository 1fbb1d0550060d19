"""Balancing without an auxiliary loss, as DeepSeek-V3 and GLM do: the router's bias of an expert follows its load.

    torchrun --nproc-per-node 2 -m hecate.examples.balance_by_bias

After each optimizer step the bias of an expert that got more tokens than the mean is lowered, and that of one with
fewer is raised (https://arxiv.org/abs/2408.15664). The loads must be those of all ranks: `engine.loads()`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from hecate.examples.shared import say
from hecate.ranks.agree import rank_and_world
from hecate.ranks.join import join

__all__ = ["update_biases"]

STEPS = 50


@torch.no_grad()
def update_biases(engine: hecate.FSSDP, speed: float = 1e-3) -> None:
    """Move the biases of all routers by `speed`. Call it on all ranks, once after each optimizer step.

    Args:
        engine: its model's routers stand beside the experts as `gate` and have `e_score_correction_bias [experts]`, a
            buffer, as those of transformers' DeepSeek-V3 and GLM-4.5.
        speed: what is added to a bias or subtracted.
    """
    names = [layer["name"].removesuffix("experts") for layer in engine.stats()["layers"]]
    for name, load in zip(names, engine.loads(), strict=True):
        bias: Tensor = engine.model.get_buffer(f"{name}gate.e_score_correction_bias")
        bias += speed * torch.from_numpy(np.sign(load.mean() - load)).to(bias)


def main() -> None:
    """Train a small DeepSeek-V3 on random tokens of which some are frequent; prints how uneven the loads are."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    device = join()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
    }
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**sizes)).to(device)
    engine = hecate.fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank_and_world()[0])
    for step in range(STEPS):
        tokens = (torch.randn(8, 32, device=device).abs() * 80).long().clamp(max=255)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_biases(engine, speed=1e-2)
        if step in (0, STEPS - 1):
            loads = np.asarray(engine.loads())
            say(f"step {step}: largest load of an expert over the mean {(loads.max(1) / loads.mean(1)).round(2)}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
