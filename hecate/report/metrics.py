"""The steps of a run's `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MetricsFile"]


@dataclass(frozen=True)
class MetricsFile:
    """The steps of a `metrics.jsonl`; each iteration reads the file anew, line by line.

    An incomplete last line, left by a killed process, is ignored; ValueError names another line that is no JSON.

    Attributes:
        path: path of the file.
        taken: whether to leave out skipped steps.
    """

    path: Path
    taken: bool = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open() as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    metrics = self._parsed(number, line)
                    if not self.taken or "loss" in metrics:
                        yield metrics

    def _parsed(self, number: int, line: str) -> dict[str, Any]:
        try:
            metrics: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}: line {number} is damaged: no JSON ({error})") from error
        return metrics
