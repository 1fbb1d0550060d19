"""Common code of the examples: printing, a tiny model, text data."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hecate.ranks.agree import rank_and_world

__all__ = ["Text", "say", "tiny_config", "tiny_model"]


def say(text: str) -> None:
    """Print on rank 0."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


def tiny_config() -> Qwen3MoeConfig:
    """A Qwen3-MoE over bytes, 0.3 M parameters."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]  # its stub lacks head_dim
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )


def tiny_model(folder: Path) -> None:
    """Write a random model of `tiny_config` in the format of `save_pretrained`, on rank 0; other ranks wait for it."""
    if rank_and_world()[0] == 0:
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(tiny_config()).save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()


class Text(Dataset[dict[str, Tensor]]):
    """Sequences of `length` bytes of Python's standard library, in the form that transformers models take."""

    def __init__(self, length: int, size: int) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        text = b"".join(file.read_bytes() for file in sorted(root.glob("*.py")))
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._length, self._size = length, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sequence `index` as `input_ids` and `labels`, both int64 `[length]` and equal."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        start = index * 7919 * self._length % (self._bytes.numel() - self._length)
        tokens = self._bytes[start : start + self._length].long()
        return {"input_ids": tokens, "labels": tokens}
