"""The folder of a run as the trainer has left it, finished or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.report.metrics import MetricsFile
from hecate.report.record import LayersFile

__all__ = ["RecordedRun"]


@dataclass(frozen=True)
class RecordedRun:
    """A run; iterating yields the metrics of the steps taken, with `loads` where they were recorded.

    Attributes:
        path: the folder.
    """

    path: Path

    def __post_init__(self) -> None:
        """ValueError says what the folder lacks."""
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder; must be the folder of a run, <output>/<name>")
        if not (self.path / "metrics.jsonl").is_file():
            raise ValueError(f"{self.path}: no metrics.jsonl in it, so it is not the folder of a run")
        if not (self.path / "layers.bin").is_file():
            raise ValueError(
                f"{self.path}: no layers.bin in it: the run was recorded by a version before 0.1, or no step was taken"
            )

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        """Whether the run has its summary; otherwise it is under way, was stopped, or died."""
        return (self.path / "summary.json").exists()

    @property
    def metrics(self) -> MetricsFile:
        """Metrics of the steps taken."""
        return MetricsFile(self.path / "metrics.jsonl", taken=True)

    @property
    def layers(self) -> LayersFile:
        """What was recorded per layer."""
        return LayersFile(self.path / "layers.bin")

    @property
    def profiles(self) -> list[Path]:
        """Traces of torch's profiler, see `hecate.train.profiling`."""
        return sorted((self.path / "profile").glob("rank*.json.gz"))

    def config(self) -> dict[str, Any]:
        """The run's configuration; empty if its record is gone."""
        import yaml  # comes with Hydra, which runs need

        path = self.path / "config.yaml"
        found: dict[str, Any] = yaml.safe_load(path.read_text()) if path.exists() else {}
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        recorded = iter(self.layers)
        step = next(recorded, None)
        for metrics in self.metrics:
            while step is not None and step.step < metrics["step"]:
                step = next(recorded, None)
            if step is not None and step.step == metrics["step"]:
                loads = [step.of_layer(layer) for layer in range(len(step.shape.layers))]
                yield metrics | {"loads": loads}
            else:
                yield metrics
