"""Zero-computation experts (MoE++, arXiv 2410.07348): some experts return their input, or nothing."""

from __future__ import annotations

from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, Model, experts, train

__all__ = ["ZeroExperts"]

EXPERTS, COPY, ZERO = 6, 6, 7


class ZeroExperts(nn.Module):
    """The router chooses 2 of 6 experts that compute, one that returns its input and one that returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS + 2, bias=False)
        self.experts = experts(EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        """Experts that compute nothing are neither sent nor counted."""
        weights, index = self.router(x).softmax(-1).topk(2)
        computed: Tensor = self.experts(x, index.masked_fill(index >= EXPERTS, -1), weights)
        copied = (weights * (index == COPY)).sum(-1, keepdim=True)
        return computed + copied * x


if __name__ == "__main__":
    train(lambda: Model(ZeroExperts))
