"""`hecate.verify`: the plain model against Hecate, one way of training after the other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from hecate.adapters.base import find_experts
from hecate.config import FSSDPConfig, PolicyName
from hecate.ranks.agree import agree, gather, on_rank_0, rank_and_world
from hecate.ranks.same import check_same
from hecate.runtime.setup import device_of
from hecate.verify.check import check_input, in_one_precision, resolve_policies, tolerance_of
from hecate.verify.compare import parts
from hecate.verify.report import Report
from hecate.verify.runs import Runs, start_row
from hecate.verify.task import Task, adamw, build, digests, gather_batches, loss_of_output
from hecate.verify.ways import Recompute, Way, offered_recomputation, ways

__all__ = ["verify"]

Functions = dict[str, Callable[..., Any]]


def verify(
    model_fn: Callable[[], nn.Module],
    batch_fn: Callable[..., Any],
    config: FSSDPConfig | None = None,
    steps: int = 5,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] = loss_of_output,
    optimizer_fn: Callable[[nn.Module], Optimizer] = adamw,
    recompute_fn: Recompute | None = None,
    policies: Sequence[PolicyName] | None = None,
    mesh: DeviceMesh | None = None,
    accumulate: int = 2,
    max_norm: float = 1.0,
    dtype: torch.dtype | None = torch.float64,
    tolerance: float | None = None,
    seed: int = 0,
    folder: str | PathLike[str] | None = None,
) -> Report:
    """Does Hecate change the training of this model? Collective; without a process group on one device.

    Rank 0 trains the plain model on the batches of all ranks, each rank's loss and auxiliary losses by themselves and
    averaged, as DDP does. Then all ranks train it under Hecate: with `config` as it is, with each policy, with
    re-sharding after every step, re-materialization, recomputed activations, `no_sync`, evaluation in between, and
    saved and loaded into a new engine halfway. Compared are the loss, the norm and the gradients of every step, loads
    and the final parameters. Whatever the model draws, dropout say, is seeded alike in all runs.

    Rank 0 needs memory for the plain model and its optimizer, and on the CPU for its gradients of all steps.

    Args:
        model_fn: makes the model with its values, the same ones on every rank and in every call; torch is seeded
            before each call. It is trained where `fully_shard` trains it.
        batch_fn: `batch_fn(number)` or `batch_fn(number, rank)`, one micro-batch: a tensor, or a sequence or mapping
            that the model is called with. Called once for each number on each rank.
        config: settings for `fully_shard`; by default the defaults without re-sharding.
        steps: optimizer steps.
        loss_fn: (model, batch) -> the scalar to differentiate; by default the model's output, or its `.loss`.
        optimizer_fn: makes the optimizer of a model, sharded or not; by default AdamW.
        recompute_fn: switches activation checkpointing of a model on, before it is sharded; by default the model's own
            way to do so, if it has one.
        policies: policies to compare; by default the configured one, then "balanced", "hecate" and "ep". All further
            ways use the first one.
        mesh: mesh for `fully_shard`.
        accumulate: micro-batches per rank and step.
        max_norm: norm that gradients are clipped to.
        dtype: torch.float64, float32 or bfloat16; the model and floating-point batches are cast to it, and everything
            is computed in it. None keeps the dtypes of model and config: rounding may then move tokens between experts.
        tolerance: largest relative error that counts as equal; by default 1e-9, 1e-4 or 5e-2 for the three dtypes.
        seed: seed of the model's values and of all random numbers that it draws.
        folder: folder for a checkpoint, on a file system that all ranks share; default: temporary files of the machine.

    Returns:
        The same report on every rank. A way that raises an error is a row of it; if ranks build different models, or
        the plain model does not repeat itself, nothing else is compared.

    Raises:
        TypeError, ValueError: an argument, or what a function returned; or a model that `fully_shard` refuses. On all
            ranks, before anything is trained under Hecate.
    """
    given = FSSDPConfig(reshard_interval=0) if config is None else config
    functions = Functions(model_fn=model_fn, batch_fn=batch_fn, loss_fn=loss_fn, optimizer_fn=optimizer_fn)
    numbers = {"steps": steps, "accumulate": accumulate}
    agree(lambda: check_input(functions, numbers, given, dtype, max_norm, tolerance))
    chosen = agree(lambda: resolve_policies(policies, given))
    check_same("verify", numbers | {"policies": chosen, "dtype": dtype, "max_norm": max_norm, "seed": seed})
    used, notes = in_one_precision(given, dtype)
    with _generators_kept(), _shared_folder(folder) as checkpoint:
        model = agree(lambda: build(model_fn, dtype, seed))
        names = agree(partial(parts, model))
        batches = gather_batches(batch_fn, steps * accumulate, dtype)
        device, weights = device_of(model, mesh), digests(model)
        task = Task(model_fn, dtype, device, batches, loss_fn, optimizer_fn, steps, accumulate, max_norm, seed, weights)
        recompute = recompute_fn or offered_recomputation(model)
        bound = tolerance_of(model, used) if tolerance is None else tolerance
        start = _start(model, task, notes, recompute)
        del model  # the runs make their own
        runs = Runs(task, names, bound, mesh, recompute, checkpoint)
        return _compared(start, runs, ways(used, chosen, recompute is not None)) if start.ok else start


def _start(model: nn.Module, task: Task, notes: tuple[str, ...], recompute: Recompute | None) -> Report:
    """The report before anything is trained: what is verified, and whether all ranks start from the same weights."""
    title = agree(partial(_title, model, task))
    if recompute is None:
        notes += ("recomputation left out: the model offers none, and recompute_fn was not passed",)
    return Report(title, (start_row(model, task.weights),), notes=notes)


def _compared(start: Report, runs: Runs, every: Iterable[Way]) -> Report:
    """The report with rows of the plain model and of all ways."""
    rows, activity = runs.compare(every)
    return replace(start, rows=(*start.rows, *rows), activity=activity)


def _title(model: nn.Module, task: Task) -> str:
    """What is verified, in words."""
    layers = find_experts(model)
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    experts = "/".join(map(str, dict.fromkeys(found.spec.num_experts for found in layers)))
    return (
        f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{_many(len(layers), 'MoE layer')} of {experts} experts; {_many(rank_and_world()[1], 'rank')}, "
        f"{task.device.type}, {dtypes}; {_many(task.steps, 'step')} of {_many(task.accumulate, 'micro-batch', 'es')} "
        f"per rank, {type(task.optimizer(model)).__name__}."
    )


def _many(number: int, what: str, ending: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else ending}"


@contextmanager
def _shared_folder(parent: str | PathLike[str] | None) -> Iterator[Path]:
    """A temporary folder of all ranks; ValueError if one does not see it."""
    path = Path(gather(agree(lambda: on_rank_0(lambda: tempfile.mkdtemp(prefix="hecate-verify-", dir=parent))))[0])
    try:
        agree(lambda: _check_seen(path))
        yield path / "checkpoint"
    finally:
        on_rank_0(lambda: shutil.rmtree(path, ignore_errors=True))


def _check_seen(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"verify: rank {rank_and_world()[0]} does not see {path}; pass folder= that all ranks share")


def _generators_kept() -> AbstractContextManager[None]:
    """Restore torch's random generators at the end of the block, since the runs seed them."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else [])
