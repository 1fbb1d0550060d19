"""The training loop: steps, validation, checkpoints and their records."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hecate.api import fully_shard
from hecate.errors import NonFiniteError
from hecate.ranks.agree import agree, on_rank_0
from hecate.report.metrics import MetricsFile
from hecate.train.banner import banner
from hecate.train.checkpoints import Checkpoints, Position
from hecate.train.data import load_data
from hecate.train.distributed import World
from hecate.train.finish import write_files
from hecate.train.folder import RunFolder
from hecate.train.lock import locked
from hecate.train.loggers import Logger, loggers
from hecate.train.models import trained_model
from hecate.train.optimizer import learning_rate, make_optimizer
from hecate.train.progress import Progress, print_table
from hecate.train.records import Records, records
from hecate.train.settings import Settings
from hecate.train.signals import exit_code
from hecate.train.summary import Totals, summarize
from hecate.train.work import Work, measure, peak_tflops

__all__ = ["Trainer", "run"]

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
    folder = RunFolder(settings.folder, config, settings.overwrite, world.launches)
    # While rank 0 waits for the lock, the other ranks wait in a collective, which must not time out.
    with locked(folder.path, world.launches, patience=settings.timeout_seconds / 2):
        if not world.broadcast(agree(lambda: on_rank_0(folder.prepare))):
            if world.rank == 0:
                print(f"{folder.path}: finished; more steps= continue it, overwrite=true starts it again", flush=True)
            return
        trainer = Trainer(settings, world, folder)
        trainer.introduce()
        # Over gloo a collective with a missing rank raises, after `timeout_seconds` at the latest; over NCCL none does.
        silent = settings.requeue_exit_code if world.device.type == "cuda" else None
        with trainer.engine.naming_missing_ranks(silent):
            trainer.resume()
            if not trainer.train():
                raise SystemExit(trainer.exit_code)


class Trainer:
    """Trains the model on one rank; all ranks must call the same methods in the same order."""

    def __init__(self, settings: Settings, world: World, folder: RunFolder) -> None:
        self.settings, self.world, self.folder = settings, world, folder
        self.trained = agree(lambda: trained_model(settings))
        self.data = agree(lambda: load_data(settings.data, settings.sequence_length, self.trained.token_limit))
        model = agree(lambda: self.trained.build(world.device))
        self.work = agree(lambda: Work.of(model, settings.sequence_length))
        self.engine = fully_shard(model, world.mesh, settings.fssdp)
        self.model = self.engine.model
        self.optimizer = agree(lambda: make_optimizer(settings.optimizer, self.model))
        self.train_model = self._train_model()
        self.checkpoints = Checkpoints(
            folder.checkpoints, self.engine, self.optimizer, settings.save_keep, settings.save_async
        )
        self.position = Position(step=0, sequences=0)
        # Results of the last step, the same on all ranks:
        self.exit_code = 0  # if not 0, the run ends after that step with this exit code
        self._save_failed = False  # whether the checkpoint being written has failed on any rank
        self._skipped = 0  # number of steps skipped in a row
        self._data_seconds = 0.0  # for the batches of the present step
        self._layers: list[dict[str, Any]] = []  # what `stats()` says of them
        self._validation: dict[str, Any] | None = None  # what `validate` found last

    def _train_model(self) -> torch.nn.Module:
        """What is called in training: the model, or DeepSpeed's engine around it."""
        if self.settings.fssdp.dense != "deepspeed":
            return self.model
        from hecate.integrations.deepspeed import initialize  # needs DeepSpeed, an optional dependency

        self.trained.fill(self.engine)  # DeepSpeed copies the values
        return initialize(self.engine, self.optimizer, self.settings.deepspeed_config)

    def resume(self) -> None:
        """Load the newest intact checkpoint, if the folder has one; else give the model its initial values."""
        if (position := self.checkpoints.resume()) is not None:
            self.position = position
            self._say(f"resumed from step {position.step} of {self.settings.steps}, {self.folder.checkpoints}")
        elif self.settings.fssdp.dense != "deepspeed":  # then it has them already
            self.trained.fill(self.engine)

    def introduce(self) -> None:
        """Print what is about to run."""
        for text in banner(self.settings, self.world, self.work, self.data.source):
            self._say(text)

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            print(text, flush=True)

    def train(self) -> bool:
        """Train up to `settings.steps`, then validate and summarize; False if asked to stop before that.

        Raises:
            NonFiniteError: see `step` and `validate`; raised after any checkpoint being written is complete.
            OSError: the last checkpoint of the run cannot be written.
        """
        self.world.stop.deferred = True
        peak = peak_tflops(self.world.device, self.settings.peak_tflops)
        shown = self.world.rank == 0
        bar = Progress(self.settings.steps, self.position.step, self.settings.log_interval, shown, peak)
        try:
            with self._loggers() as logs:
                with bar as progress, self._records(progress) as written:
                    while self.position.step < self.settings.steps:
                        with written.profiled(self.position.step + 1):
                            metrics = self.step()
                        if "loss" in metrics:
                            written.append(self.position.step, self._layers)
                        self._record(metrics, logs, progress)
                        if self.exit_code and self.position.step < self.settings.steps:
                            self.checkpoints.save_now(self.position)
                            progress.say(f"asked to stop: saved step {self.position.step}, exit {self.exit_code}")
                            return False
                        self._save_if_due(written)
                self._end(logs)
        except NonFiniteError:
            self.checkpoints.finish()
            raise
        return True

    def _record(self, metrics: dict[str, Any], logs: Sequence[Logger], progress: Progress) -> None:
        """Validate if due; log and display the metrics of a step."""
        step, interval = self.position.step, self.settings.validation.interval
        try:
            if step == self.settings.steps or (interval and step % interval == 0):
                self._validation = self.validate()
                metrics |= self._validation
        finally:
            for logger in logs:
                logger.log(metrics)
        progress.advance(metrics)

    def _end(self, logs: Sequence[Logger]) -> None:
        """Write the last checkpoint, the summary and the report.

        If the checkpoint cannot be written, the summary is printed all the same, but the run is not finished.
        """
        validation = self._validation or self.validate()  # a run that was stopped after its last step
        self.checkpoints.finish()
        try:
            if self.settings.save_interval:
                self.checkpoints.save_now(self.position)
            if self.settings.save_pretrained:
                self.engine.save_pretrained(self.folder.pretrained)
        except OSError:  # on all ranks
            self._summary(validation)
            raise
        if (summary := self._summary(validation)) is not None:
            files = write_files(summary, self.settings)
            for logger in logs:
                logger.keep(files)

    def _save_if_due(self, written: Records) -> None:
        if self._save_failed:
            self.checkpoints.finish()  # prints the error
        if self.settings.save_interval and self.position.step % self.settings.save_interval == 0:
            written.flush()
            self.checkpoints.save(self.position)

    def step(self) -> dict[str, Any]:
        """Run one step, which all ranks either take or skip, and return its metrics.

        Metrics are equal on all ranks except those that only rank 0 uses.

        Raises:
            NonFiniteError: a value is NaN or infinite, and `on_non_finite` or `max_skipped` says to stop.
        """
        settings, begin, self._data_seconds = self.settings, time.perf_counter(), 0.0
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
        tokens = sequences * settings.sequence_length
        stats = self.engine.stats()
        self._layers = stats["layers"]
        measured = measure(stats, self.world, self.work, tokens, begin)
        return {"step": self.position.step, **found, "data_seconds": self._data_seconds, **measured}

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
        begin = time.perf_counter()
        batch = self.data.training_batch(settings.seed, first, settings.batch_size, settings.sequence_length)
        self._data_seconds += time.perf_counter() - begin
        last = micro == settings.accumulate - 1
        with nullcontext() if last else self.engine.no_sync():
            found = self.trained.losses(self.train_model, batch, first, world.device)
            (found.loss / settings.accumulate).backward()
        return torch.stack([found.loss.detach(), found.lm_loss.detach()]) / settings.accumulate

    @property
    def _sequences_per_micro_batch(self) -> int:
        return self.settings.batch_size * self.world.size

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
        total = self.data.validation_count(settings.validation.sequences)
        # Every rank runs the same number of batches, because passes are collective; the last ones may not count.
        own = range(world.rank, total, world.size)
        nats = count = 0.0
        self.model.eval()
        try:
            for begin in range(0, -(-total // world.size), settings.batch_size):
                indices = own[begin : begin + settings.batch_size]
                batch = self.data.validation_batch(indices or range(1), total, settings.sequence_length)
                found = self.trained.losses(self.model, batch, indices.start, world.device)
                if indices:
                    nats += float(found.lm_loss) * found.predicted
                    count += found.predicted
        finally:
            self.model.train()
        return nats, count

    @contextmanager
    def _loggers(self) -> Iterator[Sequence[Logger]]:
        """The loggers of rank 0; if one cannot be made, all ranks raise. Collective."""
        folder, first_step = self.folder, self.position.step + 1
        with ExitStack() as stack:

            def made() -> Sequence[Logger]:
                return stack.enter_context(loggers(self.settings.logger, folder.path, first_step, folder.config))

            yield agree(lambda: on_rank_0(made)) or ()

    def _records(self, progress: Progress) -> AbstractContextManager[Records]:
        return records(self.settings, self.world, self.work.experts, self.position.step, progress.say)

    def _summary(self, validation: Mapping[str, Any]) -> dict[str, Any] | None:
        """Print the summary; returns it on rank 0."""
        memory = self.engine.stats()["memory_bytes"]
        peak = self.world.gather([memory[kind] for kind in KINDS_OF_MEMORY]).max(0).values.tolist()
        if self.world.rank != 0:
            return None
        totals = Totals(MetricsFile(self.folder.path / "metrics.jsonl"), self.settings.fssdp.load_window)
        if totals.taken == 0:
            raise NonFiniteError(f"name={self.settings.name!r}: all {totals.skipped} steps were skipped")
        summary = summarize(totals, self.settings, validation, self.data.bytes_per_token)
        summary["memory_bytes"] = {kind: int(value) for kind, value in zip(KINDS_OF_MEMORY, peak, strict=True)}
        print_table(summary, self.folder.path)
        return summary
