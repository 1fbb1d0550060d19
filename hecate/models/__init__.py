"""GPT-MoE and BERT-MoE as plain PyTorch, and the MoE layer they are made of."""

from hecate.models.bert import BertMoE, mask_tokens
from hecate.models.gpt import GPTMoE
from hecate.models.moe import Experts, MoE, Routing, TopKGate
from hecate.models.transformer import Block, ModelConfig, Output, TransformerMoE

__all__ = [
    "BertMoE",
    "Block",
    "Experts",
    "GPTMoE",
    "MoE",
    "ModelConfig",
    "Output",
    "Routing",
    "TopKGate",
    "TransformerMoE",
    "mask_tokens",
]
