"""Where the numbers of a step go: always `metrics.jsonl`, and TensorBoard or W&B where asked."""

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
    """Rank 0 calls `log` once a step, in order, and `close` at the end, also where that is an error."""

    def log(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class JsonLines:
    """One object a line, flushed, so that the file can be followed and survives a killed process."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Append to `path` from `first_step` on; what a lost process logged from there on is dropped."""
        partial = path.with_name(path.name + ".part")
        with partial.open("w") as kept:
            for metrics in MetricsFile(path) if path.exists() else ():
                if metrics["step"] < first_step:
                    kept.write(json.dumps(metrics) + "\n")
            kept.flush()
            os.fsync(kept.fileno())
        os.replace(partial, path)  # at once: a crash leaves the old one or the new one
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
    """Scalars of each step in a W&B run, offline unless `mode` says otherwise; its files are in `<folder>/wandb`."""

    def __init__(self, folder: Path, project: str, mode: str) -> None:
        import wandb

        self._run = wandb.init(project=project, mode=mode, dir=str(folder), name=folder.name)  # type: ignore[arg-type]

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(_scalars(metrics), step=metrics["step"])

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


@contextmanager
def loggers(section: Mapping[str, Any], folder: Path, first_step: int) -> Iterator[list[Logger]]:
    """`metrics.jsonl` in `folder` and the logger that `section["kind"]` names: none, tensorboard or wandb.

    Each is closed at the end, whatever happens meanwhile and to the others.
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
    """The steps of a `metrics.jsonl`, read a line at a time, whenever one goes through them.

    A last line that a killed process left unfinished is not one.

    Attributes:
        path: of the file.
        taken: only those that were not skipped.
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
    """All steps of a `metrics.jsonl` at once, for short ones."""
    return list(MetricsFile(path))


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "step"}
