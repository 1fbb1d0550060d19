"""Models and batches that verifications are tried on; functions of a module, since they go to other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import hecate
from hecate.models.gpt import GPTMoE
from hecate.models.transformer import ModelConfig
from hecate.verify.report import Report
from tests.adapters.tiny import tiny_model

SIZES = ModelConfig(vocab_size=31, max_length=8, d_model=16, num_layers=2, num_heads=2, num_experts=6, top_k=2)
QUICK: dict[str, Any] = {"steps": 2, "accumulate": 1, "policies": ["balanced"]}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gpt() -> GPTMoE:
    return GPTMoE(SIZES)


def qwen() -> nn.Module:
    return tiny_model("qwen3_moe", attention_dropout=0.1)


def pairs(number: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets as `GPTMoE` takes them; the ranks have different numbers of sequences."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    tokens = torch.randint(SIZES.vocab_size, (2 + rank, SIZES.max_length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def sentences(number: int, rank: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(100 * number + rank))
    return {"input_ids": tokens, "labels": tokens}


class DifferentOnRank1(GPTMoE):
    """As if the user forgot to seed, or to load the same weights on all ranks."""

    def __init__(self) -> None:
        super().__init__(SIZES)
        self.init_weights(seed=rank())


class NoTwoAlike(GPTMoE):
    """Another model with each call."""

    made = 0

    def __init__(self) -> None:
        super().__init__(SIZES)
        NoTwoAlike.made += 1
        self.init_weights(seed=NoTwoAlike.made)


class OwnNoise(GPTMoE):
    """Draws from a separate generator that is never seeded again."""

    generator = torch.Generator().manual_seed(0)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        output = super().forward(tokens, targets)
        assert output.loss is not None
        return output.loss * (1 + torch.rand((), generator=self.generator))


class ReadsExperts(GPTMoE):
    """Decays experts by hand, and does not find their weights under Hecate."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        output = super().forward(tokens, targets)
        assert output.loss is not None
        return output.loss + 0.1 * self.blocks[1].moe.experts.up.square().sum()


class LossOfRank(GPTMoE):
    """Each rank scales its loss differently, so that the plain run, in which one rank computes all, differs."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        output = super().forward(tokens, targets)
        assert output.loss is not None
        return output.loss * (1 + rank())


class ByWholeNorm(torch.optim.SGD):
    """Steps of unit length for each tensor, by the norm of the part that this rank has: wrong for sharded ones."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                local.div_(local.norm().clamp(min=1e-12))
        return super().step(closure)


def by_whole_norm(model: nn.Module) -> torch.optim.Optimizer:
    return ByWholeNorm(model.parameters(), lr=1e-2)


def verified(model: str, settings: Mapping[str, Any] = QUICK) -> Report:
    """The report about the model of that name in `MODELS`."""
    model_fn, batch_fn = MODELS[model]
    return hecate.verify(model_fn, batch_fn, **settings)


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "gpt": (gpt, pairs),
    "qwen": (qwen, sentences),
    "different on rank 1": (DifferentOnRank1, pairs),
    "no two alike": (NoTwoAlike, pairs),
    "own noise": (lambda: OwnNoise(SIZES), pairs),
    "reads experts": (lambda: ReadsExperts(SIZES), pairs),
    "loss of rank": (lambda: LossOfRank(SIZES), pairs),
}
