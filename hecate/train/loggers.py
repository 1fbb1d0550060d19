"""Logging of each step's metrics: always to `metrics.jsonl`, and to TensorBoard or W&B if configured.

Both get the same tags, in groups: `train/loss`, `perf/tokens_per_second`, `balance/imbalance_after`, and every
`HISTOGRAM_INTERVAL` steps a histogram of the loads of each MoE layer's experts, `balance/loads/<layer>`.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hecate.checkpoint.folder import replace_file, sync
from hecate.report.metrics import MetricsFile
from hecate.train.settings import LOGGERS

__all__ = ["RUN_ID", "JsonLines", "Logger", "MetricsFile", "loggers", "read_metrics"]

GROUPS = {
    "balance": (
        "imbalance_before",
        "imbalance_after",
        "imbalance_worst",
        "copies",
        "copies_calibrated",
        "bytes_copied",
        "mispredicted",
        "resharded_experts",
        "resharded_bytes",
    ),
    "perf": (
        "seconds",
        "data_seconds",
        "tokens",
        "tokens_per_second",
        "tflops",
        "devices",
        "memory_bytes",
        "exposed_seconds",
        "exposed_gather",
        "exposed_reduce",
        "exposed_average",
        "exposed_count",
        "exposed_plan",
        "exposed_reshard",
        "planning_seconds",
        "memory_owned",
        "memory_optimizer",
        "memory_gradients",
        "memory_copies",
    ),
}
"""Group of each scalar; all others belong to "train"."""
HISTOGRAM_INTERVAL = 20
RUN_ID = "wandb_id"
"""File in a run's folder with the id of its W&B run, so that a requeued job goes on with it."""


class Logger(Protocol):
    """Receives metrics on rank 0: `log` is called once per step, in order; `close` at the end, also after errors.

    `keep` is called when a run is finished, with the files of its report.
    """

    def log(self, metrics: Mapping[str, Any]) -> None: ...

    def keep(self, files: Sequence[Path]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class JsonLines:
    """One JSON object per line, written at once, so that the file can be followed and survives a killed process.

    Lines that cannot be written, because the disk is full, are kept and tried again with the next one. The loads of
    experts are left out; `layers.bin` has them (`hecate.report.record`).
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Append to `path` from `first_step` on; lines that an earlier process logged for these steps are removed."""
        partial = path.with_name(path.name + ".part")
        with partial.open("w") as kept:
            for metrics in MetricsFile(path) if path.exists() else ():
                if metrics["step"] < first_step:
                    kept.write(json.dumps(metrics) + "\n")
            kept.flush()
            os.fsync(kept.fileno())
        os.replace(partial, path)  # atomic: a crash leaves the old file or the new one
        sync(path.parent)
        self._file = path.open("ab", buffering=0)
        self._left = b""

    def log(self, metrics: Mapping[str, Any]) -> None:
        failed = bool(self._left)
        line = {name: value for name, value in metrics.items() if name != "loads"}
        self._left += (json.dumps(line) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if not failed:
                text = f"{self._file.name}: {error}; lines are kept and written when that is possible"
                print(text, file=sys.stderr, flush=True)

    def _write(self) -> None:
        while self._left:
            self._left = self._left[self._file.write(self._left) :]

    def keep(self, files: Sequence[Path]) -> None:
        """Nothing to do: they are in the same folder."""

    def close(self, failed: bool = False) -> None:
        """OSError if there are lines that still cannot be written."""
        with self._file:
            self._write()


class TensorBoard:
    """Scalars and histograms in `<folder>/tensorboard`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        for name, value in _scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])
        for name, loads in _histograms(metrics).items():
            self._writer.add_histogram(name, np.array(loads), metrics["step"])

    def keep(self, files: Sequence[Path]) -> None:
        """Nothing to do: TensorBoard has no files but its own."""

    def close(self, failed: bool = False) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars and histograms in one W&B run, however often it is continued. Its files are in `<folder>/wandb`.

    Args:
        folder: the run's folder.
        section: `project`, `mode`, `tags`, `group` and `job_type` as `wandb.init` takes them.
        config: the run's configuration.

    Raises:
        ValueError: W&B refuses it, e.g. `mode` "online" without an account.
    """

    def __init__(self, folder: Path, section: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        given = {key: section[key] for key in ("project", "mode", "tags", "group", "job_type")}
        try:
            self._run = wandb.init(
                dir=str(folder), name=folder.name, id=_run_id(folder), resume="allow", config=dict(config), **given
            )
        except wandb.Error as error:
            raise ValueError(f"logger.mode={section['mode']!r}: W&B cannot begin a run: {error}") from error
        self._last = self._run.step - 1
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, Any]) -> None:
        histograms = {name: self._wandb.Histogram(loads) for name, loads in _histograms(metrics).items()}
        # After a crash some steps are made again, and W&B drops values of a step before its last one. So its own count
        # goes on, and "step" is the trainer's.
        self._last = max(metrics["step"], self._last + 1)
        self._run.log({"step": metrics["step"], **_scalars(metrics), **histograms}, step=self._last)

    def keep(self, files: Sequence[Path]) -> None:
        report = self._wandb.Artifact(f"report-{self._run.id}", type="report")
        for file in files:
            report.add_file(str(file))
        self._run.log_artifact(report)

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


@contextmanager
def loggers(
    section: Mapping[str, Any], folder: Path, first_step: int, config: Mapping[str, Any]
) -> Iterator[list[Logger]]:
    """Loggers to `metrics.jsonl` in `folder` and to `section["kind"]`: none, tensorboard or wandb, which gets `config`.

    Each logger is closed at the end, even after an error or if closing another one fails.
    """
    with ExitStack() as stack:
        made: list[Logger] = []

        def add(logger: Logger) -> None:
            stack.push(lambda kind, error, trace: logger.close(failed=error is not None))
            made.append(logger)

        add(JsonLines(folder / "metrics.jsonl", first_step))
        kind = section["kind"]
        if kind == "tensorboard":
            add(TensorBoard(folder, first_step))
        elif kind == "wandb":
            add(WeightsAndBiases(folder, section, config))
        elif kind != "none":
            raise ValueError(f"logger.kind={kind!r}: must be one of {', '.join(LOGGERS)}")
        yield made


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All steps of a `metrics.jsonl` as a list; for files that fit in memory."""
    return list(MetricsFile(path))


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step by tag."""
    group = {name: key for key, names in GROUPS.items() for name in names}
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "step"}
    return {f"{group.get(name, 'train')}/{name}": value for name, value in numbers.items()}


def _histograms(metrics: Mapping[str, Any]) -> dict[str, list[int]]:
    """In every `HISTOGRAM_INTERVAL`th step, the loads of each layer's experts by tag."""
    if "loads" not in metrics or metrics["step"] % HISTOGRAM_INTERVAL:
        return {}
    return {f"balance/loads/{layer}": loads for layer, loads in enumerate(metrics["loads"])}


def _run_id(folder: Path) -> str:
    """The id of the W&B run of a run's folder; the first call makes it."""
    path = folder / RUN_ID
    if not path.exists():
        replace_file(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()
