"""Top-p routing (arXiv 2403.07652): a token uses as many experts as its router needs to be sure."""

from __future__ import annotations

from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, Model, experts, train

__all__ = ["TopP"]


class TopP(nn.Module):
    """The most probable of 8 experts that together have a probability of at least 0.4."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 8, bias=False)
        self.experts = experts(8)

    def forward(self, x: Tensor) -> Tensor:
        """An index of -1 means no expert."""
        weights, index = self.router(x).softmax(-1).sort(-1, descending=True)
        before = weights.cumsum(-1) - weights
        output: Tensor = self.experts(x, index.masked_fill(before >= 0.4, -1), weights)
        return output


if __name__ == "__main__":
    train(lambda: Model(TopP))
