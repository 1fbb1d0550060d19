"""The architectures train on two devices as in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hecate.examples import architectures
from hecate.examples.architectures.chain_of_experts import ChainOfExperts
from hecate.examples.architectures.deepseek_moe import DeepSeekMoE
from hecate.examples.architectures.expert_choice import ExpertChoice
from hecate.examples.architectures.shared import WIDTH, Model
from hecate.examples.architectures.top_p import TopP
from hecate.examples.architectures.zero_experts import ZeroExperts
from tests.runtime.helpers import Pair, case
from tests.workers import Groups

LAYERS: tuple[Callable[[], nn.Module], ...] = (DeepSeekMoE, ChainOfExperts, TopP, ExpertChoice, ZeroExperts)


def _loss(seed: int) -> Callable[[nn.Module, int], Tensor]:
    def loss(model: nn.Module, of: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * seed + of)
        x = torch.randn(24, WIDTH, dtype=torch.float64, generator=generator)
        result: Tensor = (model(x) - x.roll(1, 1)).square().mean()
        return result

    return loss


def _train() -> None:
    for layer in LAYERS:
        with case(layer):
            torch.manual_seed(0)
            pair = Pair(Model(layer).double(), reshard_interval=1)
            optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2))
            for seed in range(3):
                pair.backward(_loss(seed))
                pair.check_gradients()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            pair.check_state(rtol=1e-8)


def test_as_in_one_process(groups: Groups) -> None:
    groups(2).run(_train)


def test_they_are_short() -> None:
    for file in Path(architectures.__file__).parent.glob("*.py"):
        assert len(file.read_text().splitlines()) < 80, file.name
