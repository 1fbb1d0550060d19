"""Helpers shared by the tests of the runtime: small models and their plain counterparts, in float64 by default."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.cost import CostModel
from hecate.models.gpt import GPTMoE
from hecate.models.moe import Experts, MoE, TopKGate
from hecate.models.transformer import ModelConfig
from tests.bench import TOLERANCES, device, dtype_or, mesh_of
from tests.runtime.reference import full_gradients

SMALL = ModelConfig(
    vocab_size=17, d_model=8, num_layers=2, num_heads=2, num_experts=4, top_k=2, max_length=8, aux_weight=0.1
)
WIDTH = 8

FREE = CostModel(
    intra_node_bandwidth=10**15, inter_node_bandwidth=10**15, message_ns=0, flops=1000, hidden_permille=1000
)
"""A cost model by which copying always pays."""

SLOW_NODES = CostModel(
    intra_node_bandwidth=10**14, inter_node_bandwidth=10**6, message_ns=0, flops=1000, hidden_permille=1000
)
"""A cost model by which the node-aware exchange pays: each token crosses a node border once."""


def settings(**changes: Any) -> hecate.FSSDPConfig:
    """Settings that make copies whenever the load is uneven."""
    given = {"memory_slots": 2, "overlap_degree": 4, "calibrate": "always", "cost": FREE, "max_imbalance": 1.0}
    return hecate.FSSDPConfig(**(given | changes))


class Net(nn.Module):
    """MoE layers with residual connections on float inputs; twice differentiable, any number of experts per layer."""

    def __init__(self, experts: Sequence[int] = (4, 4), top_k: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.moes = nn.ModuleList([MoE(TopKGate(WIDTH, e, top_k), Experts(e, WIDTH, 16)) for e in experts])
        self.head = nn.Linear(WIDTH, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        for moe in self.moes:
            nn.init.normal_(moe.gate.weight, std=2.0)

    def forward(self, x: Tensor, layers: int | None = None) -> Tensor:
        """`[T, WIDTH]` to `[T, 1]`, through the first `layers` MoE layers, or all."""
        x = self.first(x)
        for moe in self.moes[:layers]:
            x = x + moe(x)[0]
        return self.head(x)


class Pair:
    """A model under FSSDP, and the plain model that it must equal.

    Attributes:
        plain, model: the plain model, and the model under FSSDP that all ranks train.
        engine: the engine of `model`.
    """

    def __init__(self, plain: nn.Module, mesh: tuple[int, ...] | None = None, **changes: Any) -> None:
        self.plain = plain
        self.model = copy.deepcopy(plain)
        self.engine = hecate.fully_shard(self.model, mesh_of(mesh), settings(**changes))

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.model, self.plain

    def backward(self, loss_of: Callable[[nn.Module, int], Tensor]) -> None:
        """Compute gradients of the mean of `loss_of(model, rank)` over ranks; the plain model computes all losses."""
        loss_of(self.model, rank()).backward()
        self.backward_plain(loss_of)

    def backward_plain(self, loss_of: Callable[[nn.Module, int], Tensor]) -> None:
        for r in range(world()):
            (loss_of(self.plain, r) / world()).backward()

    def optimizers(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """One optimizer for each of the two models."""
        return [make(list(m.parameters())) for m in self.both]

    def warm_up(self, loss_of: Callable[[nn.Module, int], Tensor]) -> None:
        """Make a step that changes only the load history, so that the next step has copies."""
        loss_of(self.model, rank()).backward()
        torch.optim.SGD(self.model.parameters(), lr=0.0).step()
        self.model.zero_grad()

    def train(self, loss_of: Callable[[int], Callable[[nn.Module, int], Tensor]]) -> None:
        """Three steps of two micro-batches; gradients and state must equal those of the plain model.

        Args:
            loss_of: by number, the loss of a micro-batch as `backward` takes it.
        """
        optimizers = self.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0))
        for seed in range(3):
            for micro_batch in (0, 10):
                self.backward(loss_of(seed + micro_batch))
            self.check_gradients()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.check_state(rtol=1e-8)

    def check_gradients(self, rtol: float = 1e-9) -> None:
        gradients = full_gradients(self.engine)
        for name, p in self.plain.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            close(f"gradient of {name}", gradients[name], expected, rtol)

    def check_state(self, rtol: float = 1e-9) -> None:
        state = self.engine.full_state_dict()
        for name, value in self.plain.state_dict().items():
            close(name, state[name], value, rtol)


def close(what: str, actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Assert that the error is at most `rtol` (more, if pytest was given a coarser dtype) times the expected norm."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, norm = float((actual - expected).norm()), float(expected.norm())
    rtol = max(rtol, TOLERANCES[dtype_or(torch.float64)].parameter)
    assert error <= rtol * norm + 1e-15, f"{what}: error {error:.3g}, norm {norm:.3g}"


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def gpt(config: ModelConfig = SMALL, seed: int = 0) -> nn.Module:
    """A small GPT with a router that prefers some experts."""
    model = GPTMoE(config).to(dtype_or(torch.float64))
    model.init_weights(seed=seed)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.gate.weight.mul_(40)
            block.moe.experts.up.mul_(5)
            block.moe.experts.down.mul_(5)
    return model.to(device())


def net(experts: Sequence[int] = (4, 4), seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(experts).to(device(), dtype_or(torch.float64))


def tokens(seed: int, of: int) -> tuple[Tensor, Tensor]:
    """One rank's inputs and targets, `[2, 8]` each."""
    drawn = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(100 * seed + of))
    return drawn[:, :-1].to(device()), drawn[:, 1:].to(device())


def floats(seed: int, of: int) -> Tensor:
    """One rank's inputs, `[6, WIDTH]`."""
    drawn = torch.randn(6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * seed + of))
    return drawn.to(device(), dtype_or(torch.float64))


def lm_loss(seed: int) -> Callable[[nn.Module, int], Tensor]:
    """The loss of a `gpt` on one rank's `tokens`."""
    return lambda model, of: model(*tokens(seed, of)).loss


def square_loss(seed: int, **kwargs: Any) -> Callable[[nn.Module, int], Tensor]:
    """The loss of a `net` on one rank's `floats`."""
    return lambda model, of: model(floats(seed, of), **kwargs).square().mean()


def error_of(act: Callable[[], object]) -> str:
    """Type and text of what `act` raises; empty if it returns."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def case(name: object) -> Iterator[None]:
    """Adds the name of the case to an error raised in the block."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{name}: {error}") from error


@contextmanager
def devices_per_node(number: int) -> Iterator[None]:
    """As torchrun tells it."""
    os.environ["LOCAL_WORLD_SIZE"] = str(number)
    try:
        yield
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def config(policy: str, **changes: object) -> hecate.FSSDPConfig:
    settings: dict[str, object] = {"memory_slots": 2, "overlap_degree": 8, "calibrate": "always", "cost": FREE}
    return hecate.FSSDPConfig(policy=policy, **(settings | changes))  # type: ignore[arg-type]
