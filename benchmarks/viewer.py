"""Seconds and size of `hecate.report` for a long run: `python -m benchmarks.viewer [--steps 10000 ...]`.

The run is synthetic: popularity of experts drifts, tokens are drawn from it, and the hottest experts have copies. It is
written by the trainer's own writer, so its size and the time per step are those of training.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report
from hecate.placement import Topology, initial_owners
from hecate.report.record import VERBS, LayersWriter, RecordedStep

__all__ = ["synthetic_layers", "write_run"]

TOKENS_PER_EXPERT = 1024
RESHARD = 500


def synthetic_layers(
    steps: int, layers: int, experts: int, topology: Topology, seed: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Per step, what `FSSDP.stats()["layers"]` would say, as far as it is recorded."""
    rng, devices = np.random.default_rng(seed), topology.num_devices
    owners = initial_owners(experts, devices)
    popularity = rng.normal(0, 0.8, (layers, experts))
    hot = np.zeros((layers, min(devices, experts)), dtype=np.int64)
    for step in range(steps):
        popularity = 0.999 * popularity + rng.normal(0, 0.03, popularity.shape)
        weights = np.exp(popularity)
        expected = weights / weights.mean(axis=1, keepdims=True) * TOKENS_PER_EXPERT
        loads = rng.poisson(expected)
        if step % 5 == 0:
            hot = np.argsort(-loads, axis=1)[:, : hot.shape[1]]
        yield [_layer(f"layers.{i}.mlp.experts", loads[i], hot[i], owners, devices, step, rng) for i in range(layers)]


def _layer(
    name: str,
    loads: NDArray[np.int64],
    hot: NDArray[np.int64],
    owners: NDArray[np.int64],
    devices: int,
    step: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    before = np.bincount(owners, weights=loads, minlength=devices).astype(np.int64)
    after = np.round(before.mean() + 0.02 * (before - before.mean()) + rng.normal(0, 3, devices)).astype(np.int64)
    copied = np.column_stack([hot, (owners[hot] + 1 + np.arange(len(hot)) + step // 5) % devices])
    copied = copied[owners[copied[:, 0]] != copied[:, 1]]
    mean = before.mean()
    return {
        "name": name,
        "loads": loads,
        "device_loads_before": before,
        "device_loads_after": after,
        "copied": copied,
        "calibrated": rng.random(len(copied)) < 0.05,
        "bytes": len(copied) * 10_000_000,
        "imbalance_before": before.max() / mean,
        "imbalance_after": after.max() / mean,
        "mispredicted": 0.02 if step else None,
        "exposed": dict(zip(VERBS, rng.exponential(1e-4, len(VERBS)).tolist(), strict=True)),
    }


def write_run(folder: Path, steps: int, layers: int, experts: int, topology: Topology) -> float:
    """Write a synthetic run into `folder`; returns the CPU seconds per step that recording its layers took."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    (folder / "config.yaml").write_text("policy: balanced\n")
    made = synthetic_layers(steps, layers, experts, topology)
    with (folder / "metrics.jsonl").open("w") as log, LayersWriter(folder / "layers.bin", 1) as writer:
        for number, stats in enumerate(made, start=1):
            begin = time.process_time()
            writer.append(RecordedStep.of(number, topology, stats))
            seconds += time.process_time() - begin
            log.write(json.dumps(_metrics(number, stats)) + "\n")
    (folder / "summary.json").write_text("{}\n")
    return seconds / steps


def _metrics(step: int, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    imbalances = {when: [layer[f"imbalance_{when}"] for layer in layers] for when in ("before", "after")}
    exposed = {f"exposed_{verb}": sum(layer["exposed"][verb] for layer in layers) for verb in VERBS}
    return {
        "step": step,
        "loss": 2 + 8 * step**-0.3 + 0.05 * np.sin(step),
        "grad_norm": 1.0,
        "tokens_per_second": 1e6 + 1e4 * np.sin(step / 7),
        "seconds": 0.5,
        "data_seconds": 0.001,
        "planning_seconds": 0.2,
        "imbalance_before": float(np.mean(imbalances["before"])),
        "imbalance_after": float(np.mean(imbalances["after"])),
        "imbalance_worst": float(np.max(imbalances["after"])),
        "mispredicted": 0.02,
        "copies": sum(len(layer["copied"]) for layer in layers),
        "copies_calibrated": sum(int(layer["calibrated"].sum()) for layer in layers),
        "bytes_copied": sum(layer["bytes"] for layer in layers),
        "resharded_experts": 40 if step % RESHARD == 0 else 0,
        "resharded_bytes": 40 * 60_000_000 if step % RESHARD == 0 else 0,
        "memory_bytes": 60 * 2**30,
        "memory_owned": 20 * 2**30,
        "memory_optimizer": 30 * 2**30,
        "memory_copies": 2 * 2**30,
        **exposed,
        "exposed_reshard": 0.5 if step % RESHARD == 0 else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="write the run and its report here, and leave them")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = _measured(given, given.keep or Path(scratch))
    print(report.table("time"), report.table("size"), sep="\n\n")
    if given.json is not None:
        report.write(given.json)


def _measured(given: argparse.Namespace, root: Path) -> Report:
    setting = f"{given.steps} steps, {given.layers} layers, {given.experts} experts, {given.devices} devices"
    run, page, report = root / "run", root / "report.html", Report()
    written = write_run(run, given.steps, given.layers, given.experts, Topology(given.devices, min(8, given.devices)))
    begin, used = time.perf_counter(), _cpu_seconds()
    subprocess.run([sys.executable, "-m", "hecate.report", str(run), "--output", str(page)], check=True)
    report.add(setting, "python -m hecate.report", "time", time.perf_counter() - begin, "s")
    report.add(setting, "python -m hecate.report, CPU time", "time", _cpu_seconds() - used, "s")
    report.add(setting, "record of a step, CPU time", "time", written, "s")
    report.add(setting, "python -m hecate.report", "size", page.stat().st_size / 1e6, "MB")
    report.add(setting, "record of all steps", "size", (run / "layers.bin").stat().st_size / 1e6, "MB")
    return report


def _cpu_seconds() -> float:
    """Of the processes that have ended; on a machine that others use too, this says more than the time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
