"""BERT-MoE: the masked language model of the paper's evaluation (section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from hecate.models.transformer import IGNORE, TransformerMoE

__all__ = ["BertMoE", "mask_tokens"]


class BertMoE(TransformerMoE):
    """Each position attends to the whole sequence; `mask_tokens` makes inputs and targets."""

    causal = False


def mask_tokens(
    tokens: Tensor, vocab_size: int, generator: torch.Generator, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of masked language modelling (arXiv 1810.04805, section 3.1).

    80 % of the chosen positions get the mask token, 10 % a random token, and 10 % keep their token.

    Args:
        tokens: int64 `[B, S]`, each in [0, vocab_size - 1): the last id is the mask token.
        vocab_size: number of ids including the mask token.
        generator: random generator on the device of `tokens`.
        share: share of positions to predict.

    Returns:
        Inputs and targets, int64 `[B, S]` each; targets are -100 at positions not to predict.
    """
    mask_token = vocab_size - 1
    chosen = torch.rand(tokens.shape, generator=generator, device=tokens.device) < share
    draw = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    random = torch.randint(mask_token, tokens.shape, generator=generator, device=tokens.device)
    inputs = torch.where(chosen & (draw < 0.8), mask_token, tokens)
    inputs = torch.where(chosen & (draw >= 0.9), random, inputs)
    return inputs, torch.where(chosen, tokens, IGNORE)
