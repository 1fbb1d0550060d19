"""DeepSeekMoE (arXiv 2401.06066): many small experts, of which shared ones are used by every token."""

from __future__ import annotations

from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, Model, experts, train

__all__ = ["DeepSeekMoE"]


class DeepSeekMoE(nn.Module):
    """Section 3: 16 routed experts of a quarter of the usual size, 4 a token, and a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 16, bias=False)
        self.experts = experts(16, hidden=8)
        self.shared = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Shared and routed experts of each token."""
        weights, index = self.router(x).softmax(-1).topk(4)
        output: Tensor = self.experts(x, index, weights)
        return output + self.shared(x)


if __name__ == "__main__":
    train(lambda: Model(DeepSeekMoE))
