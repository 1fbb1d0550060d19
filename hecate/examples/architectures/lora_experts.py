"""A mixture of LoRA experts on a frozen MLP (LoRAMoE, arXiv 2312.09979)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, Model, train
from hecate.ops.grouped import Groups, grouped_linear
from hecate.ops.plain import run_experts

__all__ = ["LoraLayer"]


class LoraExperts(nn.Module):
    """Eight pairs of low-rank matrices; their product is zero at first."""

    expert_weights = ("down", "up")

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(8, rank, WIDTH) * WIDTH**-0.5)
        self.up = nn.Parameter(torch.zeros(8, WIDTH, rank))

    def expert_mlp(self, x: Tensor, groups: Groups, weights: Mapping[str, Tensor]) -> Tensor:
        """See `hecate.adapters.base.OwnExperts`."""
        return grouped_linear(grouped_linear(x, weights["down"], groups), weights["up"], groups)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Without FSSDP: the weighted sum of each token's experts."""
        return run_experts(self.expert_mlp, {"down": self.down, "up": self.up}, x, index, weights)


class LoraLayer(nn.Module):
    """Router and low-rank matrices are trained. The frozen MLP is a dense part as any other: each rank has a share."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)).requires_grad_(False)
        self.router = nn.Linear(WIDTH, 8, bias=False)
        self.experts = LoraExperts()

    def forward(self, x: Tensor) -> Tensor:
        """The frozen MLP and what 2 experts a token add to it."""
        weights, index = self.router(x).softmax(-1).topk(2)
        output: Tensor = self.frozen(x) + self.experts(x, index, weights)
        return output


if __name__ == "__main__":
    train(lambda: Model(LoraLayer))
