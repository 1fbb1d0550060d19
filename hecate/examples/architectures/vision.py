"""A vision transformer whose MLPs are experts (V-MoE, arXiv 2106.05974): no text, a class an image."""

from __future__ import annotations

from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, experts, train

__all__ = ["VisionModel", "classification"]

CLASSES = 4


class Block(nn.Module):
    """Attention, then 1 of 8 experts a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.router = nn.Linear(WIDTH, 8, bias=False)
        self.experts = experts(8)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, patches, WIDTH]` to the same shape."""
        y = nn.functional.layer_norm(x, (WIDTH,))
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = nn.functional.layer_norm(x, (WIDTH,)).flatten(0, 1)
        weights, index = self.router(y).softmax(-1).topk(1)
        return x + self.experts(y, index, weights).view_as(x)


class VisionModel(nn.Module):
    """Images of 8 x 16 in patches of 4 x 4, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=4, stride=4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, 1, 8, 16]` to logits `[N, CLASSES]`."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(dim=1))


def classification(model: nn.Module, noise: Tensor) -> Tensor:
    """Cross-entropy of images of noise whose class is their brightest quarter."""
    images = noise.view(-1, 1, 8, 16)
    brightest = images.view(-1, 8, CLASSES, 16 // CLASSES).mean(dim=(1, 3)).argmax(dim=1)
    return nn.functional.cross_entropy(model(images), brightest)


if __name__ == "__main__":
    train(VisionModel, classification)
