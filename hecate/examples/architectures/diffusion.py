"""A diffusion transformer whose MLPs are experts (DiT-MoE, arXiv 2407.11633), trained by flow matching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, experts, train

__all__ = ["DiffusionModel", "flow_matching"]

LENGTH = 4  # tokens of an image


class Block(nn.Module):
    """Attention and experts, scaled and shifted by the noise level; 2 of 8 experts a token, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.router = nn.Linear(WIDTH, 8, bias=False)
        self.experts = experts(8)
        self.shared = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """`[N, LENGTH, WIDTH]` and the embedded level `[N, 1, WIDTH]` to `[N, LENGTH, WIDTH]`."""
        scale, shift, mlp_scale, mlp_shift = self.modulation(level).chunk(4, dim=-1)
        y = nn.functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = (nn.functional.layer_norm(x, (WIDTH,)) * (1 + mlp_scale) + mlp_shift).flatten(0, 1)
        weights, index = self.router(y).softmax(-1).topk(2)
        return x + (self.experts(y, index, weights) + self.shared(y)).view_as(x)


class DiffusionModel(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Noisy images `[N, LENGTH, WIDTH]` and their noise levels `[N, 1, 1]` in [0, 1] to velocities."""
        for block in self.blocks:
            x = block(x, self.level(level))
        return self.head(x)


def flow_matching(model: nn.Module, noise: Tensor) -> Tensor:
    """Mean square error of the velocity from made-up images (first half) to noise (second half)."""
    images, noise = noise.view(-1, LENGTH, WIDTH).chunk(2)
    images = images.cumsum(dim=-1) / WIDTH**0.5
    level = torch.sigmoid(noise[:, :1, :1])
    loss: Tensor = (model((1 - level) * images + level * noise, level) - (noise - images)).square().mean()
    return loss


if __name__ == "__main__":
    train(DiffusionModel, flow_matching)
