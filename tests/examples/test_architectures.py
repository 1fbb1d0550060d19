"""The architectures train on two devices as in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from hecate.examples import architectures
from hecate.examples.architectures.chain_of_experts import ChainOfExperts
from hecate.examples.architectures.deepseek_moe import DeepSeekMoE
from hecate.examples.architectures.diffusion import DiffusionModel, flow_matching
from hecate.examples.architectures.expert_choice import ExpertChoice
from hecate.examples.architectures.lora_experts import LoraLayer
from hecate.examples.architectures.recurrent_router import RecurrentModel
from hecate.examples.architectures.shared import WIDTH, Loss, Model, regression
from hecate.examples.architectures.top_p import TopP
from hecate.examples.architectures.vision import VisionModel, classification
from hecate.examples.architectures.zero_experts import ZeroExperts
from tests.runtime.helpers import Pair, case
from tests.workers import Groups

LAYERS: tuple[Callable[[], nn.Module], ...] = (DeepSeekMoE, ChainOfExperts, TopP, ExpertChoice, ZeroExperts, LoraLayer)
MODELS: tuple[tuple[Callable[[], nn.Module], Loss], ...] = (
    (RecurrentModel, regression),
    (DiffusionModel, flow_matching),
    (VisionModel, classification),
)


def _cases() -> Iterator[tuple[str, nn.Module, Loss]]:
    for layer in LAYERS:
        yield str(layer), Model(layer), regression
    for model, loss in MODELS:
        yield str(model), model(), loss


def _loss(seed: int, loss: Loss) -> Callable[[nn.Module, int], Tensor]:
    def of_rank(model: nn.Module, of: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * seed + of)
        return loss(model, torch.randn(24, WIDTH, dtype=torch.float64, generator=generator))

    return of_rank


def _train() -> None:
    torch.manual_seed(0)
    for name, model, loss in _cases():
        with case(name):
            pair = Pair(model.double(), reshard_interval=1)
            optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2))
            for seed in range(3):
                pair.backward(_loss(seed, loss))
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
