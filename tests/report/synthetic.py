"""Folders of small runs as the trainer leaves them, with made-up steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from benchmarks.viewer import write_run
from hecate.placement import Topology

DEVICES, LAYERS, EXPERTS = 4, 3, 8


def run(folder: Path, steps: int) -> Path:
    write_run(folder, steps, LAYERS, EXPERTS, Topology(DEVICES, 2))
    return folder


def profiled(folder: Path) -> None:
    """Add a trace of step 2: a label, one of Hecate's operators, and one of torch's."""
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "step 2", "ts": 1000.0, "dur": 500.0},
        {"ph": "X", "cat": "user_annotation", "name": "hecate::gather blocks.0", "ts": 1100.0, "dur": 200.0},
        {"ph": "X", "cat": "cpu_op", "name": "hecate::gather", "ts": 1100.0, "dur": 200.0},
        {"ph": "X", "cat": "user_annotation", "name": "Optimizer.step#AdamW.step", "ts": 1300.0, "dur": 10.0},
    ]
    (folder / "profile").mkdir()
    with gzip.open(folder / "profile" / "rank1.steps2-2.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
