"""Expert choice (arXiv 2202.09368): each expert chooses the same number of tokens, so a token may have none or all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, Model, experts, train

__all__ = ["ExpertChoice"]


class ExpertChoice(nn.Module):
    """Each of 8 experts takes the quarter of this rank's tokens that suits it best."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 8, bias=False)
        self.experts = experts(8)

    def forward(self, x: Tensor) -> Tensor:
        """Column j of the index is expert j, or -1 where it did not choose the token."""
        scores = self.router(x).softmax(-1)
        taken = scores.topk(len(x) // 4, dim=0).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(0, taken, True)
        index = torch.where(chosen, torch.arange(8, device=x.device), -1)
        output: Tensor = self.experts(x, index, scores)
        return output


if __name__ == "__main__":
    train(lambda: Model(ExpertChoice))
