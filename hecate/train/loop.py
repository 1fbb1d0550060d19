"""The training loop: steps, validation, checkpoints and their records."""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hecate.api import fully_shard
from hecate.checkpoint.folder import replace_file
from hecate.errors import NonFiniteError
from hecate.loads.trace import TraceWriter
from hecate.models import Output, mask_tokens
from hecate.placement import Topology
from hecate.ranks.agree import agree, on_rank_0
from hecate.train.checkpoints import Checkpoints, Position
from hecate.train.data import load_corpus
from hecate.train.distributed import World
from hecate.train.folder import RunFolder
from hecate.train.lock import locked
from hecate.train.loggers import Logger, MetricsFile, loggers
from hecate.train.progress import Progress, print_table
from hecate.train.settings import OptimizerSettings, Settings
from hecate.train.signals import exit_code
from hecate.train.summary import Totals, summarize

__all__ = ["Trainer", "learning_rate", "run"]

MOST_NAMES = 10
KINDS_OF_MEMORY = ("owned", "optimizer", "gradients", "copies")


def run(config: Mapping[str, Any], world: World) -> None:
    """Run one rank of a training run, from the first step (or the last checkpoint) to the summary.

    Raises:
        SystemExit: a process was asked to stop, and all have saved; code `requeue_exit_code`, or 130 after Ctrl-C.
        MissingRankError: another rank died or hangs.
        FolderInUseError: another trainer is using the run's folder; nothing was changed.
    """
    settings = Settings.from_config(config)
    folder = RunFolder(settings.folder, config, settings.resume, world.launches)
    # While rank 0 waits for the lock, the other ranks wait in a collective, which must not time out.
    with locked(folder.path, world.launches, patience=settings.timeout_seconds / 2):
        if not world.broadcast(agree(lambda: on_rank_0(folder.prepare))):
            return
        trainer = Trainer(settings, world, folder)
        # Over gloo a collective with a missing rank raises, after `timeout_seconds` at the latest; over NCCL none does.
        silent = settings.requeue_exit_code if world.device.type == "cuda" else None
        with trainer.engine.naming_missing_ranks(silent):
            trainer.resume()
            if not trainer.train():
                raise SystemExit(trainer.exit_code)


def learning_rate(step: int, steps: int, optimizer: OptimizerSettings) -> float:
    """Learning rate of step 1..steps: linear warm-up to `lr`, then half a cosine down to `final_lr_share * lr`."""
    if step <= optimizer.warmup:
        return optimizer.lr * step / optimizer.warmup
    done = (step - optimizer.warmup) / max(steps - optimizer.warmup, 1)
    share = optimizer.final_lr_share + (1 - optimizer.final_lr_share) * (1 + math.cos(math.pi * done)) / 2
    return optimizer.lr * share


class Trainer:
    """Trains the model on one rank; all ranks must call the same methods in the same order."""

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
        # Results of the last step, the same on all ranks:
        self.exit_code = 0  # if not 0, the run ends after that step with this exit code
        self._save_failed = False  # whether the checkpoint being written has failed on any rank
        self._skipped = 0  # number of steps skipped in a row

    def resume(self) -> None:
        """Load the newest intact checkpoint, if the folder has one."""
        self.position = self.checkpoints.resume() or self.position

    def train(self) -> bool:
        """Train up to `settings.steps`, then validate and summarize; False if asked to stop before that.

        Raises:
            NonFiniteError: see `step` and `validate`; raised after any checkpoint being written is complete.
            OSError: the last checkpoint of the run cannot be written.
        """
        self.world.stop.deferred = True
        bar = Progress(self.settings.steps, self.position.step, shown=self.world.rank == 0)
        try:
            with self._loggers() as logs, bar as progress, self._trace() as trace:
                while self.position.step < self.settings.steps:
                    self._step_and_record(logs, progress, trace)
                    if self.exit_code and self.position.step < self.settings.steps:
                        self.checkpoints.save_now(self.position)
                        progress.say(f"asked to stop: saved step {self.position.step}, exit {self.exit_code}")
                        return False
                    self._save_if_due(trace)
                validation = self.validate()
                if "validation_non_finite" in validation:
                    progress.say(validation["validation_non_finite"])
        except NonFiniteError:
            self.checkpoints.finish()
            raise
        self.checkpoints.finish()
        if self.settings.save_interval:
            self.checkpoints.save_now(self.position)
        self._finish(validation)
        return True

    def _step_and_record(self, logs: Sequence[Logger], progress: Progress, trace: TraceWriter | None) -> None:
        """Run one step, and validation if due; log and display the metrics."""
        metrics = self.step()
        if trace is not None and "loss" in metrics:
            trace.append(self.position.step, [layer["counts"] for layer in self.engine.stats()["layers"]])
        if self.settings.validation.interval and self.position.step % self.settings.validation.interval == 0:
            metrics |= self.validate()
        for logger in logs:
            logger.log(metrics)
        progress.advance(metrics)

    def _save_if_due(self, trace: TraceWriter | None) -> None:
        if self._save_failed:
            self.checkpoints.finish()  # prints the error
        if self.settings.save_interval and self.position.step % self.settings.save_interval == 0:
            if trace is not None:
                trace.flush()
            self.checkpoints.save(self.position)

    def step(self) -> dict[str, Any]:
        """Run one step, which all ranks either take or skip, and return its metrics.

        Metrics are equal on all ranks except those that only rank 0 uses.

        Raises:
            NonFiniteError: a value is NaN or infinite, and `on_non_finite` or `max_skipped` says to stop.
        """
        settings, begin = self.settings, time.perf_counter()
        rate = learning_rate(self.position.step + 1, settings.steps, settings.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, raised = self._losses()
        norm = math.nan if raised else float(self.engine.clip_grad_norm_(settings.optimizer.max_grad_norm))
        asked = self.world.stop.signal
        code = 0 if asked is None else exit_code(asked, settings.requeue_exit_code)
        table = self.world.gather([*losses.tolist(), code, self.checkpoints.failed()])
        self.exit_code = int(table[:, 2].max())  # the code of Ctrl-C is the largest
        self._save_failed = bool(table[:, 3].any())
        sequences = self._sequences_per_micro_batch * settings.accumulate
        self.position = Position(self.position.step + 1, self.position.sequences + sequences)
        if not (math.isfinite(norm) and bool(table.isfinite().all())):
            return self._skip(losses, norm, raised)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._skipped = 0
        loss, lm_loss = table[:, :2].mean(0).tolist()
        found = {"loss": loss, "lm_loss": lm_loss, "grad_norm": norm, "learning_rate": rate}
        return self._metrics(found, sequences * settings.sequence_length, begin)

    def _losses(self) -> tuple[Tensor, NonFiniteError | None]:
        """Compute the gradients of all micro-batches.

        Returns:
            `[2]`, loss and language-model loss (NaN if a pass raised NonFiniteError), and that error, if any.
        """
        try:
            return torch.stack([self._micro_batch(i) for i in range(self.settings.accumulate)]).sum(0), None
        except NonFiniteError as error:
            return torch.full((2,), math.nan), error

    def _skip(self, losses: Tensor, norm: float, raised: NonFiniteError | None) -> dict[str, Any]:
        """Skip the step on all ranks: parameters and optimizer stay as they are, its sequences count as used.

        See `step` for errors.
        """
        names = self._not_finite(losses, raised) or f"the gradient norm {norm}"
        text = f"step {self.position.step}: NaN or infinite: {names}"
        self.engine.skip_step()
        self._skipped += 1
        if self.settings.on_non_finite == "stop":
            raise NonFiniteError(f"{text}; on_non_finite=stop ends the run")
        if self._skipped > self.settings.max_skipped:
            raise NonFiniteError(f"{text}; {self._skipped} steps in a row, max_skipped={self.settings.max_skipped}")
        return {"step": self.position.step, "skipped": text}

    def _not_finite(self, losses: Tensor, raised: NonFiniteError | None) -> str:
        """Names of the values that are NaN or infinite, likely causes first; checks `losses` only if no pass raised."""
        names = [str(raised)] if raised else []
        names += self.engine.non_finite(None if raised else losses)
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return "; ".join(names[:MOST_NAMES]) + more

    def _micro_batch(self, micro: int) -> Tensor:
        """Forward and backward pass; returns `[2]`, loss and language-model loss divided by `accumulate`."""
        settings, world = self.settings, self.world
        first = self.position.sequences + micro * self._sequences_per_micro_batch + world.rank * settings.batch_size
        # Random numbers of a step depend only on its sequences, so a resumed run draws the same ones.
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

    def validate(self) -> dict[str, Any]:
        """Validate: returns `validation_loss`, the mean cross entropy in nats over the predicted tokens.

        If the loss is NaN or infinite, also `validation_non_finite`, which names the values that are.

        Raises:
            NonFiniteError: the loss is NaN or infinite, and `on_non_finite` says to stop.
        """
        raised: NonFiniteError | None = None
        try:
            sums = self._validation_sums()
        except NonFiniteError as error:  # raised on all ranks
            sums, raised = (math.nan, 1.0), error
        nats, count = self.world.gather(list(sums)).sum(0).tolist()
        found = {"validation_loss": nats / count}
        if math.isfinite(nats):
            return found
        names = self._not_finite(torch.tensor(sums), raised)
        text = f"validation after step {self.position.step}: NaN or infinite: {names}"
        if raised is not None:
            self.engine.skip_step()  # drops the pass that raised
        if self.settings.on_non_finite == "stop":
            raise NonFiniteError(f"{text}; on_non_finite=stop ends the run")
        return {**found, "validation_non_finite": text}

    @torch.no_grad()
    def _validation_sums(self) -> tuple[float, float]:
        """Sum of cross entropies in nats, and number of predicted tokens, over this rank's validation sequences."""
        settings, world = self.settings, self.world
        total = settings.validation.sequences
        # Every rank runs the same number of batches, because passes are collective; the last ones may be empty.
        own = range(world.rank, total, world.size)
        nats = count = 0.0
        self.model.eval()
        try:
            for begin in range(0, -(-total // world.size), settings.batch_size):
                indices = own[begin : begin + settings.batch_size]
                batch = self.corpus.validation_batch(indices, total, settings.sequence_length)
                inputs, targets = self._inputs_and_targets(batch, seed=indices.start)
                output = self.model(inputs.to(world.device), targets.to(world.device))
                predicted = int((targets != -100).sum())
                nats += float(output.lm_loss) * predicted
                count += predicted
        finally:
            self.model.train()
        return nats, count

    def _loggers(self) -> AbstractContextManager[Sequence[Logger]]:
        if self.world.rank != 0:
            return nullcontext(())
        return loggers(self.settings.logger, self.folder.path, first_step=self.position.step + 1)

    def _trace(self) -> AbstractContextManager[TraceWriter | None]:
        if not self.settings.trace or self.world.rank != 0:
            return nullcontext()
        model, path = self.settings.model, self.folder.path / "trace.npz"
        if path.exists() and not zipfile.is_zipfile(path):  # a process was killed while it wrote to it
            path.rename(path.with_suffix(".damaged.npz"))
        return TraceWriter(path, Topology.detect(self.world.size), [model.num_experts] * model.num_layers)

    def _finish(self, validation: Mapping[str, Any]) -> None:
        memory = self.engine.stats()["memory_bytes"]
        peak = self.world.gather([memory[kind] for kind in KINDS_OF_MEMORY]).max(0).values.tolist()
        if self.world.rank != 0:
            return
        from hecate.report.run import plot_run  # imported late: matplotlib takes half a second

        path = self.folder.path / "metrics.jsonl"
        totals = Totals(MetricsFile(path), self.settings.fssdp.load_window)
        if totals.taken == 0:
            raise NonFiniteError(f"name={self.settings.name!r}: all {totals.skipped} steps were skipped")
        summary = summarize(totals, self.settings, validation["validation_loss"])
        if "validation_non_finite" in validation:
            summary["validation_non_finite"] = validation["validation_non_finite"]
        summary["skipped_steps"] = totals.skipped
        summary["memory_bytes"] = {kind: int(value) for kind, value in zip(KINDS_OF_MEMORY, peak, strict=True)}
        taken, title = MetricsFile(path, taken=True), f"{self.settings.name}: policy {summary['policy']}"
        plot_run(taken, self.folder.path / "run.png", title)
        replace_file(self.folder.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_table(summary, self.folder.path)
