"""GPT-MoE: the causal language model of the paper's evaluation (section 5)."""

from __future__ import annotations

from hecate.models.transformer import TransformerMoE

__all__ = ["GPTMoE"]


class GPTMoE(TransformerMoE):
    """Each position attends to itself and earlier positions; `targets` are the tokens shifted by one."""

    causal = True
