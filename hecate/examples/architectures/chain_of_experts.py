"""Chain-of-Experts (arXiv 2506.18945): the experts of one layer are used several times, with a router a time."""

from __future__ import annotations

from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, Model, experts, train

__all__ = ["ChainOfExperts"]


class ChainOfExperts(nn.Module):
    """Two iterations over 8 experts, 2 a token and iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList([nn.Linear(WIDTH, 8, bias=False) for _ in range(2)])
        self.experts = experts(8)

    def forward(self, x: Tensor) -> Tensor:
        """Each iteration refines what the one before gave."""
        start = x
        for router in self.routers:
            weights, index = router(x).softmax(-1).topk(2)
            x = x + self.experts(x, index, weights)
        return x - start


if __name__ == "__main__":
    train(lambda: Model(ChainOfExperts))
