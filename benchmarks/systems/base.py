"""What is common to all systems: the task, a timed training step, and the bytes of a device by kind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.skews import PLACE_OF_CHOICE, Router
from hecate.models import ModelConfig
from hecate.train.data import load_data
from hecate.train.distributed import World
from hecate.train.models import trained_model
from hecate.train.optimizer import make_optimizer
from hecate.train.settings import Settings
from hecate.values.local import local_tensor

__all__ = ["MEMORY", "MissingError", "ModelKind", "System", "Task", "clip_by_total_norm", "state_bytes"]

ModelKind = Literal["gpt", "mixtral"]
MEMORY = ("owned", "optimizer", "gradients", "copies")


class MissingError(RuntimeError):
    """A system cannot run here: a package is missing, or it does not support the model."""


@dataclass(frozen=True)
class Task:
    """What all systems train.

    Attributes:
        settings: sizes of model and batches, optimizer, and `FSSDPConfig` for Hecate's policies.
        world: this process and its group.
        kind: "gpt", Hecate's own model, or "mixtral", a Mixtral of transformers of the same sizes, whose experts have
            three matrices.
    """

    settings: Settings
    world: World
    kind: ModelKind = "gpt"

    def build(self) -> nn.Module:
        """The model with the same initial values on every rank, not sharded yet."""
        if self.kind == "gpt":
            return trained_model(replace(self.settings, kind="gpt")).build(self.world.device)
        torch.manual_seed(self.settings.seed)
        return _mixtral(self.mixtral_config()).to(self.world.device)

    def mixtral_config(self) -> Any:
        """Transformers' config of the sizes in `settings`; MissingError without transformers."""
        try:
            from transformers import MixtralConfig
        except ImportError as error:
            raise MissingError("transformers is not installed") from error
        sizes = self.settings.model
        assert isinstance(sizes, ModelConfig)
        return MixtralConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.d_model,
            intermediate_size=sizes.expert_ratio * sizes.d_model,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_heads,
            num_local_experts=sizes.num_experts,
            num_experts_per_tok=sizes.top_k,
            max_position_embeddings=sizes.max_length,
            use_cache=False,
        )

    def gates(self, model: nn.Module) -> Iterable[nn.Module]:
        """The routers, in the order of the layers."""
        kinds = ("TopKGate", *PLACE_OF_CHOICE)
        return [module for module in model.modules() if any(c.__name__ in kinds for c in type(module).__mro__)]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The loss of `batch`, int64 `[B, S + 1]`."""
        batch = batch.to(self.world.device)
        inputs, targets = batch[:, :-1], batch[:, 1:]
        if self.kind == "gpt":
            return model(inputs, targets).loss
        logits = model(input_ids=inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The same AdamW for all."""
        return make_optimizer(self.settings.optimizer, model)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all devices."""
        return self.settings.batch_size * self.settings.sequence_length * self.world.size


def _mixtral(config: Any) -> nn.Module:
    from transformers import MixtralForCausalLM

    model: nn.Module = MixtralForCausalLM(config)
    return model


@dataclass(eq=False)
class System:
    """A model under one system.

    Attributes:
        task: what it trains.
        model: the sharded model.
        clip: scales all gradients to a total norm.
        figures: figures of the last step that only this system has, e.g. imbalance; the same on all ranks.
        memory: bytes on this device by kind.
        close: gives up process groups and threads.
        optimizer: of the model's parameters; None: that of the task.
        backward: computes the gradients of a loss.
        update: applies the clipped gradients; None: the optimizer's step.
        loss: of this rank's batch in the last step.
        cpu_seconds: that this process ran in the last step, all its threads together.
    """

    task: Task
    model: nn.Module
    clip: Callable[[float], object]
    figures: Callable[[], Mapping[str, float]] = field(default=dict)
    memory: Callable[[], Mapping[str, int]] | None = None
    close: Callable[[], None] = field(default=lambda: None)
    optimizer: torch.optim.Optimizer | None = None
    backward: Callable[[Tensor], object] = Tensor.backward
    update: Callable[[], object] | None = None

    loss: float = field(default=math.nan, init=False)
    cpu_seconds: float = field(default=math.nan, init=False)

    def __post_init__(self) -> None:
        settings, world = self.task.settings, self.task.world
        self.router = Router(self.task.gates(self.model), world.rank)
        self._optimizer = self.optimizer or self.task.optimizer(self.model)
        self._update = self.update or self._optimizer.step
        self._corpus = load_data(settings.data, settings.sequence_length, trained_model(settings).token_limit)

    def step(self, number: int) -> float:
        """One training step, on batch `number`; returns this rank's seconds from a common start. Collective."""
        settings, world = self.task.settings, self.task.world
        first = (number * world.size + world.rank) * settings.batch_size
        batch = self._corpus.training_batch(settings.seed, first, settings.batch_size, settings.sequence_length)
        self.router.step = number
        torch.manual_seed(first)
        dist.barrier()
        begin, ran = time.perf_counter(), time.process_time()
        loss = self.task.loss(self.model, batch)
        self.backward(loss)
        self.clip(settings.optimizer.max_grad_norm)
        self._update()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds, self.cpu_seconds = time.perf_counter() - begin, time.process_time() - ran
        self._optimizer.zero_grad()
        self.loss = loss.item()
        return seconds

    def bytes_by_kind(self) -> Mapping[str, int]:
        """Bytes on this device: weights, optimizer state, gradients, and copies of experts."""
        return self.memory() if self.memory is not None else state_bytes(self.model, self._optimizer)


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this device's parts of parameters, their gradients, and the optimizer's state."""
    parameters = list(model.parameters())
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return {
        "owned": sum(local_tensor(p).nbytes for p in parameters),
        "optimizer": sum(local_tensor(v).nbytes for v in state),
        "gradients": sum(local_tensor(p).nbytes for p in parameters if p.requires_grad),
        "copies": 0,
    }


def clip_by_total_norm(parts: Iterable[nn.Parameter], whole: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients to a total norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`. Collective.

    Args:
        parts: parameters of which every element is on one rank only.
        whole: parameters that all ranks have, with equal gradients.
        max_norm: the norm.
    """
    own, same = ([local_tensor(p.grad) for p in group if p.grad is not None] for group in (parts, whole))
    square = _squares(own)
    dist.all_reduce(square)
    scale = (max_norm / ((square + _squares(same)).sqrt() + 1e-6)).clamp(max=1.0)
    for grad in (*own, *same):
        grad.mul_(scale)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements, float32."""
    zero = torch.zeros((), device=tensors[0].device if tensors else None)
    return torch.stack([zero, *(tensor.float().square().sum() for tensor in tensors)]).sum()
