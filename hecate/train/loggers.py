"""Logging of each step's metrics: always to `metrics.jsonl`, and to TensorBoard or W&B if configured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hecate.checkpoint.folder import sync

__all__ = ["JsonLines", "Logger", "MetricsFile", "loggers", "read_metrics"]


class Logger(Protocol):
    """Receives metrics on rank 0: `log` is called once per step, in order; `close` at the end, also after errors."""

    def log(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class JsonLines:
    """One JSON object per line, flushed after each, so that the file can be followed and survives a killed process."""

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
        self._file = path.open("a")

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self, failed: bool = False) -> None:
        self._file.close()


class TensorBoard:
    """Scalars of each step in `<folder>/tensorboard`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        for name, value in _scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def close(self, failed: bool = False) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars of each step in a W&B run; `mode` is W&B's, e.g. "offline". Its files are in `<folder>/wandb`."""

    def __init__(self, folder: Path, project: str, mode: str) -> None:
        import wandb

        self._run = wandb.init(project=project, mode=mode, dir=str(folder), name=folder.name)  # type: ignore[arg-type]

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(_scalars(metrics), step=metrics["step"])

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


@contextmanager
def loggers(section: Mapping[str, Any], folder: Path, first_step: int) -> Iterator[list[Logger]]:
    """Loggers to `metrics.jsonl` in `folder` and to `section["kind"]`: none, tensorboard or wandb.

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
            add(WeightsAndBiases(folder, section["project"], section["mode"]))
        elif kind != "none":
            raise ValueError(f"logger.kind={kind!r}: must be one of none, tensorboard, wandb")
        yield made


@dataclass(frozen=True)
class MetricsFile:
    """The steps of a `metrics.jsonl`; each iteration reads the file anew, line by line.

    An incomplete last line, left by a killed process, is ignored.

    Attributes:
        path: path of the file.
        taken: whether to leave out skipped steps.
    """

    path: Path
    taken: bool = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open() as file:
            for line in file:
                if line.endswith("\n"):
                    metrics = json.loads(line)
                    if not self.taken or "loss" in metrics:
                        yield metrics


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All steps of a `metrics.jsonl` as a list; for files that fit in memory."""
    return list(MetricsFile(path))


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "step"}
