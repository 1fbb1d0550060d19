"""The run that all others are compared with: the plain model in one process, on the batches of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.adapters.base import find_experts
from hecate.ranks.agree import rank_and_world
from hecate.verify.compare import Step
from hecate.verify.task import Task

__all__ = ["Trace", "first_step", "trace"]


@dataclass(frozen=True)
class Trace:
    """The results of the plain run.

    Attributes:
        steps: results of each step, in order.
        weights: parameters after the last step, by name, on the CPU.
    """

    steps: Sequence[Step]
    weights: dict[str, Tensor]


def trace(task: Task) -> Trace:
    """Train the plain model in this process. Gradients of all steps are kept on the CPU."""
    model = task.build().to(task.device)
    optimizer = task.optimizer(model)
    steps = [_step(task, model, optimizer, number) for number in range(task.steps)]
    return Trace(steps, {name: _on_cpu(p) for name, p in model.named_parameters()})


def first_step(task: Task) -> Step:
    """The first step once more, of a new model: a model that does not repeat itself cannot be compared."""
    model = task.build().to(task.device)
    return _step(task, model, task.optimizer(model), 0)


def _step(task: Task, model: nn.Module, optimizer: Optimizer, step: int) -> Step:
    _, world = rank_and_world()
    scale = 1 / (world * task.accumulate)  # each rank's gradients are averaged over ranks, as DDP and FSDP do
    total = 0.0
    with _counting(model) as loads:
        for rank in range(world):
            for number in task.numbers(step):
                loss = task.loss(model, number, rank)
                (loss * scale).backward()
                total += loss.item() * scale
    gradients = {name: _gradient(p) for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.max_norm).item()
    optimizer.step()
    optimizer.zero_grad()
    evaluation = sum(task.evaluation(model, step, rank) for rank in range(world)) / world
    return Step(total, norm, gradients, loads, evaluation)


@contextmanager
def _counting(model: nn.Module) -> Iterator[list[NDArray[np.int64]]]:
    """Count, per MoE layer, the (token, expert) pairs that its experts module is called with in the block."""
    layers = find_experts(model)
    loads = [np.zeros(layer.spec.num_experts, np.int64) for layer in layers]

    def count(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        loads[layer] += np.bincount(index.flatten().cpu().numpy(), minlength=len(loads[layer]))

    handles = [
        found.module.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: count(layer, args, kwargs), with_kwargs=True
        )
        for layer, found in enumerate(layers)
    ]
    try:
        yield loads
    finally:
        for handle in handles:
            handle.remove()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return _on_cpu(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
