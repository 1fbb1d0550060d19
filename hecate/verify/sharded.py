"""One run under Hecate: the steps of the plain one, made in one of the ways."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from hecate.api import FSSDP, fully_shard
from hecate.experts import POOL_PREFIX, OwnedExperts
from hecate.ranks.agree import gather, rank_and_world
from hecate.values.full import full_tensor
from hecate.values.local import local_tensor
from hecate.verify.compare import Step
from hecate.verify.task import Task
from hecate.verify.ways import Recompute, Way

__all__ = ["Sharded"]


class Sharded:
    """A model under Hecate and its optimizer. Everything here is collective.

    Args:
        task: what is trained.
        way: how it is trained.
        mesh: as `fully_shard` takes it.
        recompute: switches activation checkpointing on, before the model is sharded.

    Attributes:
        copies: number of copies planned, over all layers and steps.
        moved: number of changes of owners, over all steps.
    """

    def __init__(self, task: Task, way: Way, mesh: DeviceMesh | None, recompute: Recompute | None) -> None:
        self._task, self._way, self._mesh, self._recompute = task, way, mesh, recompute
        self._rank, _ = rank_and_world()
        self.copies = self.moved = 0
        self._engine, self._optimizer = self._start()
        self._owners = _owners(self._engine)

    def _start(self) -> tuple[FSSDP, Optimizer]:
        model = self._task.build()
        if self._way.recompute and self._recompute is not None:
            self._recompute(model)
        engine = fully_shard(model, self._mesh, self._way.config)
        return engine, self._task.optimizer(engine.model)

    def step(self, step: int) -> Step:
        """One optimizer step."""
        loss = _mean(sum(self._pass(number, step) for number in self._task.numbers(step)) / self._task.accumulate)
        gradients = _gradients(self._engine)
        norm = self._engine.clip_grad_norm_(self._task.max_norm).item()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.copies += sum(layer["copies"] for layer in self._engine.stats()["layers"])
        loads = list(self._engine.loads())
        evaluation = self._evaluation(step) if self._way.evaluate else None
        before, self._owners = self._owners, _owners(self._engine)
        self.moved += sum(int((old != new).sum()) for old, new in zip(before, self._owners, strict=True))
        return Step(loss, norm, gradients, loads, evaluation)

    def _pass(self, number: int, step: int) -> float:
        """Run forward and backward pass of one micro-batch; returns its loss."""
        last = number == self._task.numbers(step)[-1]
        with self._engine.no_sync() if self._way.no_sync and not last else nullcontext():
            loss = self._task.loss(self._engine.model, number, self._rank)
            if self._way.evaluate:
                self._evaluation(step)
            (loss / self._task.accumulate).backward()
        return loss.item()

    def _evaluation(self, step: int) -> float:
        return _mean(self._task.evaluation(self._engine.model, step, self._rank))

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers by their original names, on the CPU."""
        return self._engine.full_state_dict()

    def reload(self, folder: Path) -> None:
        """Save weights and optimizer; go on with a new model and a new optimizer that have loaded them."""
        self._engine.save(folder, self._optimizer)
        self._engine.close()
        self._engine, self._optimizer = self._start()
        self._engine.load(folder, self._optimizer)

    def close(self) -> None:
        """Release process groups and threads."""
        self._engine.close()


def _mean(value: float) -> float:
    """The mean of `value` over all ranks."""
    everywhere = gather(value)
    return sum(everywhere) / len(everywhere)


def _owners(engine: FSSDP) -> Sequence[NDArray[np.int64]]:
    return [owners for pool in engine.pools for owners in pool.owners]


def _gradients(engine: FSSDP) -> dict[str, Tensor]:
    """Whole gradients of all trained parameters by original name, on the CPU of every rank; zeros if there is none."""
    full = {
        name: full_tensor(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in engine.model.named_parameters()
        if p.requires_grad and not name.startswith(POOL_PREFIX)
    }
    entries = [entry for pool in engine.pools for entry in pool.entries() if entry.parameter.requires_grad]
    return full | {entry.name: _stacked(entry) for entry in entries}


def _stacked(entry: OwnedExperts) -> Tensor:
    """The gradient of one stacked weight, `[experts, *shape]`, put together from the rows of all owners."""
    gradient = entry.parameter.grad
    local = local_tensor(torch.zeros_like(entry.parameter) if gradient is None else gradient)
    parts = gather((entry.experts, entry.of(local).cpu()))
    stacked = local.new_full((entry.num_experts, *local.shape[1:]), float("nan"), device="cpu")
    for experts, rows in parts:
        stacked[torch.from_numpy(experts)] = rows
    return stacked
