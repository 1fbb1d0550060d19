"""Ways people train a model of transformers or Hecate's GPT, each against the same model in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

import hecate
from hecate.models.gpt import GPTMoE
from hecate.models.transformer import Output
from tests.adapters.parity import CONFIG, TOLERANCE, adamw, batch, close, spread_router
from tests.adapters.tiny import tiny_model
from tests.runtime.helpers import FREE
from tests.runtime.reference import TINY, full_gradients

MAX_NORM = 0.3
"""Norm that gradients are clipped to; below the norms of both models."""
GPT = "gpt"
"""Model type of `TinyGPT`. Its dtype is float64, and its cost model makes copies free, so that there are many."""
GPT_TOLERANCE = 1e-9


class TinyGPT(GPTMoE):
    """Hecate's GPT with the interface of transformers' models."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(replace(TINY, vocab_size=64, **changes))
        self.init_weights(seed=0)
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        """Each token is predicted from those before it."""
        return super().forward(input_ids[:, :-1], labels[:, 1:])

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any]) -> None:
        self.config = replace(self.config, checkpoint=True, **gradient_checkpointing_kwargs)


def unchanged(model: nn.Module) -> nn.Module:
    return model


def one_by_one(engine: hecate.FSSDP | None, model: Callable[..., Any], batches: list[Tensor], scale: float) -> Tensor:
    """A backward pass after each forward pass; the mean loss."""
    losses = []
    for tokens in batches:
        losses.append(loss_of(model, tokens))
        (losses[-1] * scale).backward()
    return torch.stack([loss.detach() for loss in losses]).mean()


def by_engine(engine: hecate.FSSDP) -> Tensor:
    return engine.clip_grad_norm_(MAX_NORM)


def by_torch(engine: hecate.FSSDP) -> Tensor:
    norm = torch.nn.utils.clip_grad_norm_(engine.model.parameters(), MAX_NORM)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


Passes = Callable[[hecate.FSSDP | None, Callable[..., Any], list[Tensor], float], Tensor]


@dataclass(frozen=True)
class Way:
    """One training run to compare. All functions are of a module, since they go to other processes.

    Attributes:
        model_type: of the tiny model; `GPT` or one of transformers.
        model: changes of its configuration.
        config: of FSSDP.
        prepare: what is done to the model before it is sharded.
        passes, plain_passes: forward and backward passes over the micro-batches of a step, their losses scaled; return
            the mean loss.
        wrap, plain_wrap: what is called instead of the sharded and of the plain model, made after sharding.
        optimizer: of a model, sharded or not.
        clip: clips the gradients; returns the norm.
        keep_zeros: gradients are set to zero after a step, not to None.
        scheduler: of the learning rate.
        micro_batches: a step and rank.
        steps: optimizer steps.
        tolerance: relative, of gradients and parameters.
    """

    model_type: str = "qwen3_moe"
    model: Mapping[str, Any] = field(default_factory=dict)
    config: hecate.FSSDPConfig = CONFIG
    prepare: Callable[[nn.Module], nn.Module] = unchanged
    passes: Passes = one_by_one
    plain_passes: Passes = one_by_one
    wrap: Callable[[nn.Module], Callable[..., Any]] = unchanged
    plain_wrap: Callable[[nn.Module], Callable[..., Any]] = unchanged
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    clip: Callable[[hecate.FSSDP], Tensor] = by_engine
    keep_zeros: bool = False
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    micro_batches: int = 1
    steps: int = 3
    tolerance: float = TOLERANCE


def on_gpt(way: Way) -> Way:
    """The same way to train `TinyGPT`."""
    config = replace(way.config, cost=FREE, overlap_degree=8)
    return replace(way, model_type=GPT, config=config, tolerance=GPT_TOLERANCE)


def compare_way(way: Way) -> None:
    """Runs on every rank; rank 0 holds the plain model and asserts."""
    made = TinyGPT(**way.model) if way.model_type == GPT else tiny_model(way.model_type, **way.model)
    plain = way.prepare(spread_router(made))
    names = list(plain.state_dict())  # peft changes the order in a forward pass
    engine = hecate.fully_shard(copy.deepcopy(plain), None, way.config)
    called = way.wrap(engine.model)
    optimizer, plain_optimizer = way.optimizer(engine.model), way.optimizer(plain)
    schedulers = [way.scheduler(o) for o in (optimizer, plain_optimizer)] if way.scheduler else []
    world = dist.get_world_size()
    for step in range(way.steps):
        loss = way.passes(engine, called, micro_batches(way, step, dist.get_rank()), 1 / way.micro_batches)
        assert all(p.requires_grad or p.grad is None for p in engine.model.parameters())
        gradients = full_gradients(engine)
        norm = way.clip(engine)
        optimizer.step()
        state = engine.full_state_dict()
        dist.all_reduce(loss)
        if way.model_type == GPT:
            check_counts(engine, world * way.micro_batches * batch(0, 0)[:, 1:].numel() * TINY.top_k)
        if dist.get_rank() == 0:
            everybody = [tokens for rank in range(world) for tokens in micro_batches(way, step, rank)]
            plain_loss = way.plain_passes(None, way.plain_wrap(plain), everybody, 1 / len(everybody))
            close(f"step {step}: loss", loss / world, plain_loss, way.tolerance)
            compare_gradients(f"step {step}", gradients, plain, way.tolerance)
            plain_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
            close(f"step {step}: norm", norm, plain_norm, way.tolerance)
            plain_optimizer.step()
            assert list(state) == names
            for name, value in plain.state_dict().items():
                close(f"step {step}: {name}", state[name], value, way.tolerance)
        for scheduler in schedulers:
            scheduler.step()
        optimizer.zero_grad(set_to_none=not way.keep_zeros)
        plain_optimizer.zero_grad()


def check_counts(engine: hecate.FSSDP, expected: int) -> None:
    """Each token is counted once per step, in every layer: not again in evaluation or recomputation."""
    assert [int(layer["counts"].sum()) for layer in engine.stats()["layers"]] == [expected] * TINY.num_layers


def compare_gradients(where: str, gradients: Mapping[str, Tensor], plain: nn.Module, tolerance: float) -> None:
    """All gradients; frozen parameters and those that were not reached have none."""
    for name, p in plain.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        close(f"{where}: gradient of {name}", gradients[name], expected, tolerance)


def micro_batches(way: Way, step: int, rank: int) -> list[Tensor]:
    """The tokens of one rank, the same wherever they are made."""
    return [batch(10 * step + i, rank) for i in range(way.micro_batches)]


def loss_of(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    """Dropout and sampling routers draw the same for the same tokens."""
    torch.manual_seed(int(tokens.sum()))
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def error_of(call: Callable[[], object]) -> str:
    """The error that `call` raises, as text; "no error" if none."""
    try:
        call()
    except (ValueError, RuntimeError, TypeError) as error:
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return "no error"
