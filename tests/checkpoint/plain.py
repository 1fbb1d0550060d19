"""The plain model in one process, trained as `Run` trains; state dicts at any ownership are compared with its own."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from hecate.models.transformer import ModelConfig
from tests.checkpoint.runs import BALANCED, TINY, Run, batch, make_optimizer, plain_model

TOLERANCE = {"rtol": 1e-8, "atol": 1e-12}


@dataclass(frozen=True)
class Way:
    """A configuration in which experts change owners in every step.

    Attributes:
        experts: number of experts per layer.
        mesh: shape of the device mesh; None: all ranks.
        pools, dense: fields of `FSSDPConfig`.
        optimizer: see `make_optimizer`.
    """

    experts: int = 8
    mesh: tuple[int, ...] | None = None
    pools: str = "shared"
    dense: str = "fsdp"
    optimizer: str = "AdamW"

    @property
    def model(self) -> ModelConfig:
        return replace(TINY, num_experts=self.experts)

    @property
    def config(self) -> hecate.FSSDPConfig:
        return replace(BALANCED, pools=self.pools, dense=self.dense)  # type: ignore[arg-type]

    def run(self, seed: int = 1) -> Run:
        return Trained(self.config, self.mesh, self.model, self.optimizer, seed)


class Trained(Run):
    """A run that reduces dense gradients itself if `dense="none"`."""

    def step(self, number: int) -> float:
        loss = self.loss(number)
        loss.backward()
        if self.engine.config.dense == "none":
            for name, parameter in self.model.named_parameters():
                if not name.startswith("hecate_pool_") and parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.get_buffer("numbers").add_(number)
        return float(loss.detach())


@dataclass
class Plain:
    """The plain model and its optimizer."""

    way: Way
    seed: int = 1
    model: torch.nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.model = plain_model(self.way.model, self.seed)
        self.optimizer = make_optimizer(self.way.optimizer, self.model)

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            tokens = batch(number)
            self.model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.get_buffer("numbers").add_(number)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        return deepcopy(self.model.state_dict()), deepcopy(self.optimizer.state_dict())

    def restore(self, snapshot: tuple[dict[str, Tensor], dict[str, object]]) -> None:
        model, optimizer = deepcopy(snapshot)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


def assert_same(run: Run, plain: Plain) -> None:
    """Assert that all parameters and buffers agree."""
    state, expected = run.engine.full_state_dict(), plain.model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
