"""Models of unusual shapes: pyramids, one layer alone, another top-k in each layer, fewer experts than devices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import hecate
from hecate.models.moe import Experts, MoE, TopKGate
from tests.runtime.helpers import WIDTH, Pair, case, floats
from tests.workers import Groups


class Pyramid(nn.Module):
    """Layers of different widths, numbers of experts, sizes of experts and top-k."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((WIDTH, 5, 16, 1), (6, 2, 4, 2), (4, 7, 12, 3))
        self.moes = nn.ModuleList([MoE(TopKGate(d, e, k), Experts(e, d, f)) for d, e, f, k in sizes])
        self.between = nn.ModuleList([nn.Linear(a[0], b[0]) for a, b in pairwise(sizes)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        for moe, between in zip(self.moes, [*self.between, nn.Identity()], strict=True):
            x = between(x + moe(x)[0])
        return x


def _alone() -> nn.Module:
    """One MoE layer is the whole model."""
    model = MoE(TopKGate(WIDTH, 2, 1), Experts(2, WIDTH, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def _loss(model: nn.Module, of: int) -> Tensor:
    output = model(floats(0, of))
    return (output[0] if isinstance(output, tuple) else output).square().mean()


def _train() -> None:
    for make in (Pyramid, _alone):
        for changes in (
            {"reshard_interval": 1},
            {"rematerialize": True, "dense": "replicate", "policy": "hecate"},
            {"pools": "layer", "policy": "ep"},
        ):
            with case(f"{make.__name__}, {changes}"):
                torch.manual_seed(0)
                pair = Pair(make().double(), **changes)  # type: ignore[arg-type]
                optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2))
                for _ in range(3):
                    pair.backward(_loss)
                    pair.check_gradients()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                pair.check_state(rtol=1e-8)


def test_three_devices(groups: Groups) -> None:
    """Both the second layer of the pyramid and the single layer have two experts only."""
    groups(3).run(_train)


def test_experts_as_the_model() -> None:
    with pytest.raises(ValueError, match="the model itself, Experts, is an experts module; wrap it in the module that"):
        hecate.fully_shard(Experts(4, 8, 16))
