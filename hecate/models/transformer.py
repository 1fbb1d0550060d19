"""The common part of GPT-MoE and BERT-MoE: a pre-norm transformer with an MoE layer as every feed-forward network.

Shapes: B sequences, S tokens per sequence, d model width, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hecate.models.moe import AuxScope, Experts, MoE, TopKGate
from hecate.names import original_modules
from hecate.values.initialize import Stack, initialize

__all__ = ["Block", "ModelConfig", "Output", "TransformerMoE"]

IGNORE = -100
INIT_STD = 0.02


@dataclass(frozen=True)
class ModelConfig:
    """Size and options of a GPT-MoE or BERT-MoE (paper, section 5, table of models).

    Attributes:
        vocab_size: V; BERT-MoE's last id is its mask token.
        d_model: width of a token.
        num_layers: blocks, each with one MoE layer.
        num_heads: attention heads; `d_model` is an even multiple of it.
        num_experts: experts per layer.
        top_k: experts per token.
        max_length: largest sequence length.
        expert_ratio: hidden width of an expert over `d_model`; 2 in the paper.
        aux_weight: factor of the load-balance loss, which is averaged over layers.
        aux_scope: see `TopKGate`; with "global" the loss equals that of one process with the tokens of all ranks.
        jitter: see `TopKGate`.
        random_second_expert: see `TopKGate`.
        checkpoint: recompute each block in backward (torch.utils.checkpoint).
        use_reentrant: which of torch's two checkpoint implementations.
    """

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    max_length: int = 256
    expert_ratio: int = 2
    aux_weight: float = 0.01
    aux_scope: AuxScope = "rank"
    jitter: float = 0.0
    random_second_expert: bool = False
    checkpoint: bool = False
    use_reentrant: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_experts", "max_length", "expert_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name}={getattr(self, name)}: must be >= 1")
        if self.aux_scope not in get_args(AuxScope):
            raise ValueError(
                f"ModelConfig.aux_scope={self.aux_scope!r}: must be one of {', '.join(get_args(AuxScope))}"
            )
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"ModelConfig: d_model={self.d_model} must be an even multiple of num_heads={self.num_heads}"
            )


class Output(NamedTuple):
    """What a model returns.

    Attributes:
        logits: `[B, S, V]`.
        loss: `lm_loss + aux_weight * aux_loss`, the scalar to differentiate; None without targets.
        lm_loss: mean cross entropy in nats over the targets that are not ignored, 0 if all are ignored; None without
            targets.
        aux_loss: mean over layers of the gates' load-balance losses.
    """

    logits: Tensor
    loss: Tensor | None
    lm_loss: Tensor | None
    aux_loss: Tensor


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) for `[B, heads, S, h]`, h even: rotates each pair (i, i + h/2)."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device).unsqueeze(1) * frequency  # [S, h/2], float32
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions (`scaled_dot_product_attention`), without bias or dropout."""

    def __init__(self, d_model: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, d]` to `[B, S, d]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and MoE layer, each applied to a normalized input and added to the residual stream; one FSDP2 unit."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        d = config.d_model
        self.attention_norm = nn.LayerNorm(d)
        self.attention = Attention(d, config.num_heads, causal)
        self.moe_norm = nn.LayerNorm(d)
        self.moe = MoE(
            TopKGate(d, config.num_experts, config.top_k, config.jitter, config.random_second_expert, config.aux_scope),
            Experts(config.num_experts, d, config.expert_ratio * d),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, S, d]` to (`[B, S, d]`, the MoE layer's auxiliary loss)."""
        x = x + self.attention(self.attention_norm(x))
        update, aux_loss = self.moe(self.moe_norm(x))
        return x + update, aux_loss


class TransformerMoE(nn.Module):
    """Token embedding, blocks, final norm, output head (not tied to the embedding).

    `_no_split_modules` names the units that `hecate.fully_shard` hands to FSDP2 one by one. A model built under
    `torch.device("meta")` has no values until `FSSDP.init_weights` gives it some.
    """

    causal: ClassVar[bool]
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList([Block(config, self.causal) for _ in range(config.num_layers)])
        self.final_norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:
            self.init_weights(seed=0)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Output:
        """Logits of every token and, if targets are given, the losses.

        Args:
            tokens: int64 `[B, S]`, S <= max_length; B may be 0.
            targets: int64 `[B, S]`, the id that each position should predict; -100 is ignored.
        """
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"{type(self).__name__}: sequences of {length} tokens, must be <= max_length={self.config.max_length}"
            )
        x = self.tokens(tokens)
        aux_losses = []
        for block in self.blocks:
            x, aux_loss = self._run(block, x)
            aux_losses.append(aux_loss)
        logits = self.head(self.final_norm(x))
        aux = torch.stack(aux_losses).mean()
        if targets is None:
            return Output(logits, None, None, aux)
        lm_loss = cross_entropy(logits, targets)
        return Output(logits, lm_loss + self.config.aux_weight * aux, lm_loss, aux)

    def _run(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.checkpoint and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=self.config.use_reentrant)
        return block(x)

    def init_weights(self, seed: int) -> None:
        """Initialize all parameters in place before sharding, to the values of `FSSDP.init_weights(seed)` after it."""
        stacks = [
            Stack(
                name,
                {kind: getattr(module, kind).detach() for kind in module.expert_weights},
                range(module.num_experts),
            )
            for name, module in original_modules(self).items()
            if isinstance(module, Experts)
        ]
        initialize(self, stacks, seed)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the direct parameters of `module`, and the attention's output matrix, by GPT-2's rule.

        Normal with standard deviation 0.02, divided by sqrt(2 * num_layers) for the two matrices per layer that write
        to the residual stream; norms start as the identity.
        """
        residual = INIT_STD / (2 * self.config.num_layers) ** 0.5
        if isinstance(module, nn.Linear | nn.Embedding | TopKGate):
            nn.init.normal_(module.weight, std=INIT_STD)
        elif isinstance(module, Attention):
            nn.init.normal_(module.out.weight, std=residual)
        elif isinstance(module, Experts):
            nn.init.normal_(module.up, std=INIT_STD)
            nn.init.normal_(module.down, std=residual)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, at least float32; if every target is ignored, 0 with an autograd graph."""
    scores = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(scores, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)
