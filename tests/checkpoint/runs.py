"""Training runs that stop, save, load and continue; functions that every rank of a test group runs."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import hecate
from hecate.cost import CostModel
from hecate.examples.adafactor import ShardedAdafactor
from hecate.models.gpt import GPTMoE
from hecate.models.transformer import ModelConfig
from tests.runtime.reference import TINY as REFERENCE

# No load-balance loss: it is not linear in the tokens of a rank, so that losses would depend on the world size.
TINY = replace(REFERENCE, aux_weight=0.0)

# Experts change owners in every step, and compute at this speed hides two copies, which fill both slots.
BALANCED = hecate.FSSDPConfig(memory_slots=2, reshard_interval=1, cost=CostModel(flops=3_200_000_000_000))
SEQUENCES = 12  # per step, divided among all ranks, so that a batch is the same at any world size


class Run:
    """A tiny GPT-MoE on the group's ranks, or on one device; `plans` has the placements planned before each step."""

    def __init__(
        self,
        config: hecate.FSSDPConfig = BALANCED,
        mesh: tuple[int, ...] | None = None,
        model: ModelConfig = TINY,
        optimizer: str = "AdamW",
        seed: int = 1,
        frozen: str | None = None,
        tied: bool = False,
    ) -> None:
        self.model = plain_model(model, seed)
        if tied:
            self.model.head.weight = self.model.tokens.weight
        if frozen is not None:
            self.model.get_submodule(frozen).requires_grad_(False)
        names = ("replicate", "shard")
        device_mesh = None if mesh is None else init_device_mesh("cpu", mesh, mesh_dim_names=names)
        self.engine = hecate.fully_shard(self.model, device_mesh, config)
        self.optimizer = make_optimizer(optimizer, self.model)
        self.plans: list[object] = []

    def train(self, first: int, last: int) -> list[float]:
        """Run steps `first` to `last - 1`; returns mean losses."""
        return [self.step(number) for number in range(first, last)]

    def step(self, number: int) -> float:
        loss = self.loss(number)
        self.plans.append(self.engine._engine._placements)
        loss.backward()
        self.engine.clip_grad_norm_(0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.get_buffer("numbers").add_(number)
        total = loss.detach().double()
        if self.world > 1:
            dist.all_reduce(total)
        return float(total) / self.world

    def loss(self, number: int) -> Tensor:
        """The loss of this rank's part of the step's batch."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        tokens = batch(number)[rank :: self.world]
        return self.model(tokens[:, :-1], tokens[:, 1:]).loss

    @torch.no_grad()
    def evaluate(self) -> None:
        self.loss(99)

    @property
    def world(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def owners(self) -> list[list[int]]:
        """By layer of the only pool."""
        return [owners.tolist() for pool in self.engine.pools for owners in pool.owners]

    def copies(self) -> int:
        return sum(layer["copies"] for layer in self.engine.stats()["layers"])


def plain_model(config: ModelConfig = TINY, seed: int = 1) -> GPTMoE:
    """A small model in float64, with a skewed router and a buffer."""
    model = GPTMoE(config).double()
    model.init_weights(seed=seed)
    model.register_buffer("numbers", torch.full((3,), float(seed)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20)
    return model


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(TINY.vocab_size, (SEQUENCES, TINY.max_length + 1), generator=generator)


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    if name == "Adafactor":
        return ShardedAdafactor(model.parameters(), lr=1e-2)
    if name == "groups":
        named = list(model.named_parameters())
        decayed = [p for n, p in named if "hecate_pool" in n or ".experts." in n]
        rest = [p for n, p in named if not ("hecate_pool" in n or ".experts." in n)]
        return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 3e-3}], lr=1e-2)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
