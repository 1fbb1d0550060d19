"""The training loop: steps, validation, checkpoints, and what is recorded of them."""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hecate.api import fully_shard
from hecate.collectives.ranks import agree, on_rank_0
from hecate.models import Output, mask_tokens
from hecate.placement import Topology
from hecate.planning.trace import TraceWriter
from hecate.report.run import plot_run
from hecate.runtime.finite import NonFiniteError
from hecate.train.checkpoints import Checkpoints, Position
from hecate.train.data import load_corpus
from hecate.train.distributed import World
from hecate.train.folder import RunFolder, replace_file
from hecate.train.loggers import Logger, make_loggers, read_metrics
from hecate.train.progress import Progress, print_table
from hecate.train.settings import OptimizerSettings, Settings
from hecate.train.summary import summarize

__all__ = ["Trainer", "learning_rate", "run"]

MOST_NAMES = 10
KINDS_OF_MEMORY = ("owned", "optimizer", "gradients", "copies")


def run(config: Mapping[str, Any], world: World) -> None:
    """One rank of a run, from the first step (or the last checkpoint) to the summary.

    Raises:
        SystemExit: with `requeue_exit_code`, where the process was asked to stop and all ranks have saved.
    """
    settings = Settings.from_config(config)
    folder = RunFolder(settings.folder, config, settings.resume, world.restarted)
    if not world.broadcast(agree(lambda: on_rank_0(folder.prepare))):
        return
    trainer = Trainer(settings, world, folder)
    with trainer.engine.naming_missing_ranks():
        trainer.resume()
        if not trainer.train():
            raise SystemExit(settings.requeue_exit_code)


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
        self.checkpoints = Checkpoints(
            folder.checkpoints, self.engine, self.optimizer, settings.save_keep, settings.save_async
        )
        self.position = Position(step=0, sequences=0)
        self._stop = False  # after this step, on all ranks
        self._skipped = 0  # steps in a row

    def resume(self) -> None:
        """Go to the newest whole checkpoint, if the folder has one."""
        self.position = self.checkpoints.resume() or self.position

    def train(self) -> bool:
        """Steps up to `settings.steps`, then validation and summary; False where it was asked to stop before."""
        settings, self.world.stop.deferred = self.settings, True
        loggers = self._loggers()
        bar = Progress(settings.steps, self.position.step, shown=self.world.rank == 0)
        with bar as progress, self._trace() as trace:
            while self.position.step < settings.steps:
                metrics = self._step_or_finish_saving()
                if trace is not None and "loss" in metrics:
                    trace.append(self.position.step, [layer["counts"] for layer in self.engine.stats()["layers"]])
                if settings.validation.interval and self.position.step % settings.validation.interval == 0:
                    metrics["validation_loss"] = self.validate()
                for logger in loggers:
                    logger.log(metrics)
                progress.advance(metrics)
                if self._stop and self.position.step < settings.steps:
                    self.checkpoints.save_now(self.position)
                    progress.say(f"asked to stop: saved step {self.position.step}, exit {settings.requeue_exit_code}")
                    return False
                if settings.save_interval and self.position.step % settings.save_interval == 0:
                    if trace is not None:
                        trace.flush()
                    self.checkpoints.save(self.position)
        validation_loss = self.validate()
        for logger in loggers:
            logger.close()
        self.checkpoints.finish()
        if settings.save_interval:
            self.checkpoints.save_now(self.position)
        self._finish(validation_loss)
        return True

    def _step_or_finish_saving(self) -> dict[str, Any]:
        """`step`; where it ends the run, the checkpoint that is being written is completed first."""
        try:
            return self.step()
        except NonFiniteError:
            self.checkpoints.finish()
            raise

    def step(self) -> dict[str, Any]:
        """One step, taken or skipped by all ranks together; its metrics, equal on all but for what only rank 0 needs.

        Raises:
            NonFiniteError: something is NaN or infinite, and `on_non_finite` or `max_skipped` says to stop.
        """
        settings, begin = self.settings, time.perf_counter()
        rate = learning_rate(self.position.step + 1, settings.steps, settings.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, raised = self._losses()
        norm = math.nan if raised else float(self.engine.clip_grad_norm_(settings.optimizer.max_grad_norm))
        table = self.world.gather([*losses.tolist(), self.world.stop.signal is not None])
        self._stop = bool(table[:, 2].any())
        sequences = self._sequences_per_micro_batch * settings.accumulate
        self.position = Position(self.position.step + 1, self.position.sequences + sequences)
        if not (math.isfinite(norm) and bool(table.isfinite().all())):
            return self._skip(losses, norm, raised)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._skipped = 0
        loss, lm_loss, _ = table.mean(0).tolist()
        found = {"loss": loss, "lm_loss": lm_loss, "grad_norm": norm, "learning_rate": rate}
        return self._metrics(found, sequences * settings.sequence_length, begin)

    def _losses(self) -> tuple[Tensor, NonFiniteError | None]:
        """Gradients of all micro-batches; `[2]`: loss and language-model loss. NaN where a pass raised, and what."""
        try:
            return torch.stack([self._micro_batch(i) for i in range(self.settings.accumulate)]).sum(0), None
        except NonFiniteError as error:
            return torch.full((2,), math.nan), error

    def _skip(self, losses: Tensor, norm: float, raised: NonFiniteError | None) -> dict[str, Any]:
        """Leave parameters and optimizer as they are on all ranks; the data goes on. See `step` for what it raises."""
        names = [str(raised)] if raised else []
        names += self.engine.non_finite(None if raised else losses) or [f"the gradient norm {norm}"]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        text = f"step {self.position.step}: NaN or infinite: {'; '.join(names[:MOST_NAMES])}{more}"
        self.engine.skip_step()
        self._skipped += 1
        if self.settings.on_non_finite == "stop":
            raise NonFiniteError(f"{text}; on_non_finite=stop ends the run")
        if self._skipped > self.settings.max_skipped:
            raise NonFiniteError(f"{text}; {self._skipped} steps in a row, max_skipped={self.settings.max_skipped}")
        return {"step": self.position.step, "skipped": text}

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

    def _metrics(self, found: Mapping[str, float], tokens: int, begin: float) -> dict[str, Any]:
        layers = self.engine.stats()["layers"]
        exposed = float(self.world.gather([sum(layer["exposed_seconds"] for layer in layers)]).max())
        seconds = time.perf_counter() - begin
        return {
            "step": self.position.step,
            **found,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "imbalance_before": float(np.mean([layer["imbalance_before"] for layer in layers])),
            "imbalance_after": float(np.mean([layer["imbalance_after"] for layer in layers])),
            "copies": sum(layer["copies"] for layer in layers),
            "bytes_copied": sum(layer["bytes"] for layer in layers),
            "exposed_seconds": exposed,
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

    def _loggers(self) -> list[Logger]:
        if self.world.rank != 0:
            return []
        return make_loggers(self.settings.logger, self.folder.path, first_step=self.position.step + 1)

    def _trace(self) -> AbstractContextManager[TraceWriter | None]:
        if not self.settings.trace or self.world.rank != 0:
            return nullcontext()
        model, path = self.settings.model, self.folder.path / "trace.npz"
        if path.exists() and not zipfile.is_zipfile(path):  # a process was killed while it wrote to it
            path.rename(path.with_suffix(".damaged.npz"))
        return TraceWriter(path, Topology.detect(self.world.size), [model.num_experts] * model.num_layers)

    def _finish(self, validation_loss: float) -> None:
        memory = self.engine.stats()["memory_bytes"]
        peak = self.world.gather([memory[kind] for kind in KINDS_OF_MEMORY]).max(0).values.tolist()
        if self.world.rank != 0:
            return
        metrics = read_metrics(self.folder.path / "metrics.jsonl")
        taken = [m for m in metrics if "loss" in m]
        if not taken:
            raise NonFiniteError(f"name={self.settings.name!r}: all {len(metrics)} steps were skipped")
        summary = summarize(taken, self.settings, validation_loss)
        summary["skipped_steps"] = len(metrics) - len(taken)
        summary["memory_bytes"] = {kind: int(value) for kind, value in zip(KINDS_OF_MEMORY, peak, strict=True)}
        plot_run(taken, self.folder.path / "run.png", title=f"{self.settings.name}: policy {summary['policy']}")
        replace_file(self.folder.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_table(summary, self.folder.path)
