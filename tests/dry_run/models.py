"""The models of the dry run, with realistic widths: fake tensors cost no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from hecate.models import GPTMoE
from hecate.models.transformer import ModelConfig

__all__ = ["MODELS"]

LAYERS = 2


def num_experts(world: int) -> int:
    """More experts than devices, and not a multiple of them where there are several."""
    return 8 if world == 1 else 2 * world + world // 2


def gpt(world: int, top_k: int = 2, checkpoint: bool = False) -> nn.Module:
    """A GPT-MoE."""
    config = ModelConfig(
        vocab_size=256,
        d_model=1024,
        num_layers=LAYERS,
        num_heads=8,
        num_experts=num_experts(world),
        top_k=top_k,
        checkpoint=checkpoint,
    )
    with torch.device("cuda"):
        return GPTMoE(config)


def qwen3(world: int) -> nn.Module:
    """A Qwen3-MoE of transformers, made from its config."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=num_experts(world),
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        output_router_logits=False,
    )
    with torch.device("cuda"):
        return Qwen3MoeForCausalLM(config)


MODELS: Mapping[str, Callable[[int], nn.Module]] = {
    "gpt": gpt,
    "gpt with 6 experts per token": lambda world: gpt(world, top_k=6),
    "gpt recomputed": lambda world: gpt(world, checkpoint=True),
    "qwen3_moe": qwen3,
}
