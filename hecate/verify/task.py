"""What all runs of a verification have in common: the user's functions, and the batches they train on."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.ranks.agree import agree, gather, rank_and_world
from hecate.text import listed
from hecate.values.initialize import on_meta

__all__ = [
    "Task",
    "adamw",
    "build",
    "call_with",
    "digests",
    "gather_batches",
    "loss_of",
    "loss_of_output",
    "moved",
]

EPSILON = 1e-4
"""Epsilon of the default AdamW: large enough that a gradient that is only rounding noise causes no large step."""


@dataclass(frozen=True)
class Task:
    """One training run, whichever way it is made.

    Attributes:
        model_fn: makes the model.
        dtype: dtype that its parameters and buffers are cast to; None leaves them.
        device: device that batches are put on.
        batches: batches by number and rank, on the CPU.
        loss_fn: (model, batch) -> the scalar to differentiate.
        optimizer_fn: makes the optimizer of a model, sharded or not.
        steps: optimizer steps.
        accumulate: micro-batches per rank and step.
        max_norm: norm that gradients are clipped to.
        seed: seed of all random numbers that the model draws.
        weights: digests of the weights that `model_fn` gave first; see `digests`.
    """

    model_fn: Callable[[], nn.Module]
    dtype: torch.dtype | None
    device: torch.device
    batches: Sequence[Sequence[Any]]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    optimizer_fn: Callable[[nn.Module], Optimizer]
    steps: int
    accumulate: int
    max_norm: float
    seed: int
    weights: Mapping[str, str]

    def build(self) -> nn.Module:
        """Make the model again, ready to train.

        Raises:
            ValueError: its weights differ from those of the first model.
        """
        model = build(self.model_fn, self.dtype, self.seed)
        again = digests(model)
        if other := {name for name in {**self.weights, **again} if self.weights.get(name) != again.get(name)}:
            raise ValueError(
                f"verify: model_fn gave other values of {listed(other)} when it was called again; it must make a new "
                "model with the same weights each time (torch's generators are seeded before each call)"
            )
        return model

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Make the user's optimizer; TypeError if it is not an optimizer."""
        optimizer = self.optimizer_fn(model)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"verify: optimizer_fn returned {type(optimizer).__name__}; must be a torch.optim.Optimizer"
            )
        return optimizer

    def numbers(self, step: int) -> range:
        """The numbers of the micro-batches of a step."""
        return range(step * self.accumulate, (step + 1) * self.accumulate)

    def loss(self, model: nn.Module, number: int, rank: int) -> Tensor:
        """The loss of one micro-batch of one rank. Random numbers depend only on micro-batch and rank.

        Raises:
            ValueError: the loss is not a scalar, or in training depends on no trainable parameter.
        """
        _, world = rank_and_world()
        torch.manual_seed(self.seed + 1 + number * world + rank)
        loss = self.loss_fn(model, moved(self.batches[number][rank], self.device))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"verify: the loss is {what}; must be a tensor with one number; pass loss_fn(model, batch)"
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError("verify: the loss depends on no parameter that requires a gradient")
        return loss.reshape(())

    @torch.no_grad()
    def evaluation(self, model: nn.Module, step: int, rank: int) -> float:
        """The loss of a step's first micro-batch, without training."""
        model.eval()
        loss = self.loss(model, self.numbers(step)[0], rank).item()
        model.train()
        return loss


def build(model_fn: Callable[[], nn.Module], dtype: torch.dtype | None, seed: int) -> nn.Module:
    """`model_fn()` after seeding, cast and in training mode.

    Raises:
        TypeError: the result is not a module.
        ValueError: the model has no values yet.
    """
    torch.manual_seed(seed)
    model = model_fn()
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: model_fn returned {type(model).__name__}; must be a torch.nn.Module")
    if empty := on_meta(model):
        raise ValueError(
            f"verify: model_fn left {listed(empty)} on the meta device; the plain run needs a model with values"
        )
    if dtype == torch.float64 and callable(choose := getattr(model, "set_experts_implementation", None)):
        choose("eager")  # transformers' default is torch's grouped_mm, which has no float64
    return (model if dtype is None else model.to(dtype)).train()


def digests(model: nn.Module) -> dict[str, str]:
    """Name of each parameter and buffer -> its shape, dtype and SHA-256."""
    return {name: _digest(tensor) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


def gather_batches(batch_fn: Callable[..., Any], count: int, dtype: torch.dtype | None) -> list[list[Any]]:
    """`count` batches of every rank, each made on its own rank, by number and rank, on the CPU. Collective.

    Args:
        batch_fn: `batch_fn(number)` or `batch_fn(number, rank)`.
        count: number of batches per rank.
        dtype: dtype that floating-point tensors are cast to; None leaves them.
    """
    rank, _ = rank_and_world()
    takes = len(agree(lambda: _required(batch_fn)))

    def make() -> list[Any]:
        return [moved(batch_fn(*(number, rank)[:takes]), torch.device("cpu"), dtype) for number in range(count)]

    return [list(batches) for batches in zip(*gather(agree(make)), strict=True)]


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters without a default; ValueError if there are more than two."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if len(names) > 2:
        raise ValueError(f"verify: batch_fn takes {', '.join(names)}; must take (number) or (number, rank)")
    return names


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The same nesting of mappings and sequences, its tensors on `device` and floating-point ones of `dtype`."""
    if isinstance(value, Tensor):
        cast = dtype if value.is_floating_point() else None
        return value.detach().to(device, cast)
    if isinstance(value, Mapping):
        return {name: moved(each, device, dtype) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return tuple(moved(each, device, dtype) for each in value)
    return value


def call_with(model: Callable[..., Any], batch: Any) -> Any:
    """The model's output: a mapping becomes keywords, a tuple positional arguments, else the batch is the argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def loss_of(output: Any) -> Any:
    """`output.loss`, `output["loss"]` or the output itself."""
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return getattr(output, "loss", output)


def loss_of_output(model: nn.Module, batch: Any) -> Any:
    """The default `loss_fn`: the loss in what the model returns for the batch."""
    return loss_of(call_with(model, batch))


def adamw(model: nn.Module) -> Optimizer:
    """The default `optimizer_fn`."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=EPSILON)
