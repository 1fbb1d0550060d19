"""The training loop: steps, validation, checkpoints, and what is recorded of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hecate.api import fully_shard
from hecate.models import Output, mask_tokens
from hecate.placement import Topology
from hecate.planning.trace import TraceWriter
from hecate.report.run import plot_run
from hecate.train.data import load_corpus
from hecate.train.distributed import World
from hecate.train.folder import Position, RunFolder
from hecate.train.loggers import Logger, make_loggers, read_metrics
from hecate.train.progress import Progress, print_table
from hecate.train.settings import OptimizerSettings, Settings

__all__ = ["Trainer", "learning_rate", "run"]

LN2 = math.log(2)
KINDS_OF_MEMORY = ("owned", "optimizer", "gradients", "copies")


def run(config: Mapping[str, Any], world: World) -> None:
    """One rank of a run, from the first step (or the last checkpoint) to the summary."""
    settings = Settings.from_config(config)
    folder = RunFolder(settings.folder, config, settings.resume)
    trouble = None
    if world.rank == 0:
        try:
            folder.prepare()
        except ValueError as error:
            trouble = str(error)
    if trouble := world.broadcast(trouble):
        raise ValueError(trouble)
    trainer = Trainer(settings, world, folder)
    with trainer.engine.naming_missing_ranks():
        trainer.resume()
        trainer.train()


def learning_rate(step: int, steps: int, optimizer: OptimizerSettings) -> float:
    """Of step 1..steps: linear warm-up to `lr`, then half a cosine down to `final_lr_share * lr`."""
    if step <= optimizer.warmup:
        return optimizer.lr * step / optimizer.warmup
    done = (step - optimizer.warmup) / max(steps - optimizer.warmup, 1)
    share = optimizer.final_lr_share + (1 - optimizer.final_lr_share) * (1 + math.cos(math.pi * done)) / 2
    return optimizer.lr * share


class Trainer:
    """Trains one model on one rank; all ranks call the same methods in the same order."""

    def __init__(self, settings: Settings, world: World, folder: RunFolder) -> None:
        self.settings, self.world, self.folder = settings, world, folder
        self.corpus = load_corpus(settings.data, settings.sequence_length, settings.token_limit)
        self.engine = fully_shard(settings.build_model(world.device), world.mesh, settings.fssdp)
        self.model = self.engine.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.optimizer.lr,
            betas=settings.optimizer.betas,
            weight_decay=settings.optimizer.weight_decay,
        )
        self.position = Position(step=0, sequences=0)

    def resume(self) -> None:
        """Go to the newest checkpoint, if the folder has one."""
        latest = self.folder.latest()
        if latest is not None:
            path, self.position = latest
            self.engine.load(str(path), self.optimizer)

    def train(self) -> None:
        """Steps up to `settings.steps`, then validation and summary."""
        settings = self.settings
        loggers = self._loggers()
        bar = Progress(settings.steps, self.position.step, shown=self.world.rank == 0)
        with bar as progress, self._trace() as trace:
            while self.position.step < settings.steps:
                metrics = self.step()
                if trace is not None:
                    trace.append(self.position.step, [layer["counts"] for layer in self.engine.stats()["layers"]])
                if settings.validation.interval and self.position.step % settings.validation.interval == 0:
                    metrics["validation_loss"] = self.validate()
                for logger in loggers:
                    logger.log(metrics)
                progress.advance(metrics)
                if settings.save_interval and self.position.step % settings.save_interval == 0:
                    self.save()
        validation_loss = self.validate()
        for logger in loggers:
            logger.close()
        self._finish(validation_loss)

    def step(self) -> dict[str, Any]:
        """One optimizer step; its metrics, equal on all ranks but for what only rank 0 needs."""
        settings, begin = self.settings, time.perf_counter()
        rate = learning_rate(self.position.step + 1, settings.steps, settings.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = torch.stack([self._micro_batch(i) for i in range(settings.accumulate)]).sum(0)
        norm = self.engine.clip_grad_norm_(settings.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        sequences = self._sequences_per_micro_batch * settings.accumulate
        self.position = Position(self.position.step + 1, self.position.sequences + sequences)
        return self._metrics(losses, float(norm), rate, sequences * settings.sequence_length, begin)

    def _micro_batch(self, micro: int) -> Tensor:
        """Forward and backward; `[2]`: loss and language-model loss, as shares of the step's mean."""
        settings, world = self.settings, self.world
        first = self.position.sequences + micro * self._sequences_per_micro_batch + world.rank * settings.batch_size
        # Random numbers of a step depend on its sequences alone: a resumed run draws what the unbroken one would have.
        torch.manual_seed(settings.seed * 1_000_003 + first)
        batch = self.corpus.training_batch(settings.seed, first, settings.batch_size, settings.sequence_length)
        last = micro == settings.accumulate - 1
        with nullcontext() if last else self.engine.no_sync():
            output = self._forward(batch, seed=first)
            (output.loss / settings.accumulate).backward()
        return torch.stack([output.loss.detach(), output.lm_loss.detach()]) / settings.accumulate

    @property
    def _sequences_per_micro_batch(self) -> int:
        return self.settings.batch_size * self.world.size

    def _forward(self, batch: Tensor, seed: int) -> Any:
        """The model's `Output` with losses for `batch` `[B, S + 1]`."""
        inputs, targets = self._inputs_and_targets(batch, seed)
        output: Output = self.model(inputs.to(self.world.device), targets.to(self.world.device))
        return output

    def _inputs_and_targets(self, batch: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        if self.settings.kind == "gpt":
            return batch[:, :-1], batch[:, 1:]
        return mask_tokens(batch[:, :-1], self.settings.model.vocab_size, torch.Generator().manual_seed(seed))

    def _metrics(self, losses: Tensor, norm: float, rate: float, tokens: int, begin: float) -> dict[str, Any]:
        layers = self.engine.stats()["layers"]
        exposed = sum(layer["exposed_seconds"] for layer in layers)
        table = self.world.gather([*losses.tolist(), exposed])
        loss, lm_loss, _ = table.mean(0).tolist()
        seconds = time.perf_counter() - begin
        return {
            "step": self.position.step,
            "loss": loss,
            "lm_loss": lm_loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "imbalance_before": float(np.mean([layer["imbalance_before"] for layer in layers])),
            "imbalance_after": float(np.mean([layer["imbalance_after"] for layer in layers])),
            "copies": sum(layer["copies"] for layer in layers),
            "bytes_copied": sum(layer["bytes"] for layer in layers),
            "exposed_seconds": float(table[:, 2].max()),
            "loads": [layer["loads"].tolist() for layer in layers],
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross entropy in nats over the predicted tokens of the validation sequences."""
        settings, world = self.settings, self.world
        self.model.eval()
        total = settings.validation.sequences
        # Every rank runs the same number of batches; one that has no sequence left joins with an empty one.
        own = range(world.rank, total, world.size)
        nats = count = 0.0
        for begin in range(0, -(-total // world.size), settings.batch_size):
            indices = own[begin : begin + settings.batch_size]
            batch = self.corpus.validation_batch(indices, total, settings.sequence_length)
            inputs, targets = self._inputs_and_targets(batch, seed=indices.start)
            output = self.model(inputs.to(world.device), targets.to(world.device))
            predicted = int((targets != -100).sum())
            nats += float(output.lm_loss) * predicted
            count += predicted
        self.model.train()
        nats, count = world.gather([nats, count]).sum(0).tolist()
        return nats / count

    def save(self) -> None:
        """A checkpoint of the position reached; complete once rank 0 has written the position."""
        path = self.folder.new_checkpoint(self.position.step)
        self.engine.save(str(path), self.optimizer)
        if self.world.rank == 0:
            self.folder.commit(self.position)
        self.world.broadcast(None)

    def _loggers(self) -> list[Logger]:
        if self.world.rank != 0:
            return []
        return make_loggers(self.settings.logger, self.folder.path, first_step=self.position.step + 1)

    def _trace(self) -> AbstractContextManager[TraceWriter | None]:
        if not self.settings.trace or self.world.rank != 0:
            return nullcontext()
        model = self.settings.model
        experts = [model.num_experts] * model.num_layers
        return TraceWriter(self.folder.path / "trace.npz", Topology.detect(self.world.size), experts)

    def _finish(self, validation_loss: float) -> None:
        memory = self.engine.stats()["memory_bytes"]
        peak = self.world.gather([memory[kind] for kind in KINDS_OF_MEMORY]).max(0).values.tolist()
        if self.world.rank != 0:
            return
        metrics = read_metrics(self.folder.path / "metrics.jsonl")
        summary = summarize(metrics, self.settings, validation_loss)
        summary["memory_bytes"] = {kind: int(value) for kind, value in zip(KINDS_OF_MEMORY, peak, strict=True)}
        plot_run(metrics, self.folder.path / "run.png", title=f"{self.settings.name}: policy {summary['policy']}")
        (self.folder.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print_table(summary, self.folder.path)


def summarize(metrics: list[dict[str, Any]], settings: Settings, validation_loss: float) -> dict[str, Any]:
    """The run in a few numbers: means over the steps after the first `load_window`, in which history is short."""
    steady = metrics[settings.fssdp.load_window :] or metrics
    bits, bytes_per_token = validation_loss / LN2, settings.data.bytes_per_token

    def mean(name: str) -> float:
        return float(np.mean([m[name] for m in steady]))

    return {
        "name": settings.name,
        "policy": settings.fssdp.policy,
        "devices": settings.devices,
        "steps": len(metrics),
        "tokens": sum(m["tokens"] for m in metrics),
        "train_loss": metrics[-1]["loss"],
        "val_bits_per_token": bits,
        "val_bits_per_byte": bits / bytes_per_token if bytes_per_token else None,
        "tokens_per_second": sum(m["tokens"] for m in steady) / sum(m["seconds"] for m in steady),
        "imbalance_before": mean("imbalance_before"),
        "imbalance_after": mean("imbalance_after"),
        "copies_per_step": mean("copies"),
        "bytes_copied": sum(m["bytes_copied"] for m in metrics),
        "exposed_seconds": sum(m["exposed_seconds"] for m in metrics),
        "seconds": sum(m["seconds"] for m in metrics),
    }
