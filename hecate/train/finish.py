"""The files of a finished run: a picture, the summary and the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hecate.checkpoint.folder import replace_file
from hecate.report.folder import RecordedRun
from hecate.report.metrics import MetricsFile
from hecate.report.page import html
from hecate.train.settings import Settings

__all__ = ["write_files"]


def write_files(summary: Mapping[str, Any], settings: Settings) -> list[Path]:
    """Write `run.png`, `summary.json`, with which the run counts as finished, and the report if it is wanted.

    Returns:
        What was written. A report that cannot be made is said, and costs nothing else.

    Raises:
        OSError: the picture or the summary cannot be written.
    """
    from hecate.report.run import plot_run  # imported late: matplotlib takes half a second

    folder = settings.folder
    picture, record, report = (folder / name for name in ("run.png", "summary.json", "report.html"))
    metrics = folder / "metrics.jsonl"
    recorded = (folder / "layers.bin").exists()  # not if the disk was full when the run began
    steps: Iterable[Mapping[str, Any]] = RecordedRun(folder) if recorded else MetricsFile(metrics, taken=True)
    plot_run(steps, picture, f"{settings.name}: policy {settings.fssdp.policy}")
    replace_file(record, json.dumps(summary, indent=2) + "\n")
    written = [picture, record]
    if settings.report:
        try:
            written.append(html([folder], report))
        except (ValueError, OSError, ImportError) as error:
            print(f"{report}: cannot be written ({error})", flush=True)
    return written
