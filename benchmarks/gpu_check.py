"""Everything that needs a GPU in one command: whether kernels and training are right on it, and how fast they are.

`make gpu-check`, or `python benchmarks/gpu_check.py --device cpu` for a dry run in which the kernels' code runs on the
CPU. Each step is a process with a time limit, and what it measured is in the JSON file as soon as it was measured. The
last line says what passed, what failed and what was not reached; the table before it says which goals
(`gpu_goals.py`) the figures reach.

Speed is given in percent of what the same device reached in the same step: of the bytes per second of a large copy
(the bytes that a kernel must read and write at least, each counted once, over its time), or of the operations per
second of a large matrix product (`gpu_layers.py` says what is counted).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

if __name__ == "__main__":  # started by its path from any folder: the installed hecate is found before the checkout's
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

import torch
from torch import Tensor

from benchmarks.gpu_exact import exact, exact_symmetric
from benchmarks.gpu_goals import table, verdicts
from benchmarks.gpu_kernels import Case, Size, cases
from benchmarks.gpu_layers import layers, train
from benchmarks.gpu_symmetric import symmetric_speed
from benchmarks.gpu_timing import copy_ceiling, emit, seconds
from benchmarks.gpu_variants import variants
from benchmarks.report import Report
from hecate.ops.kernels.choice import reason_against

SMALL = Size(tokens=67, top_k=3, experts=8, width=264, hidden=40, owned=3)
LARGE = Size(tokens=16384, top_k=8, experts=128, width=2048, hidden=768, owned=16)
ROUNDING = 2**-7
"""Two neighbouring numbers of bfloat16: the last bit of exp and erf may differ."""


def smoke(device: torch.device) -> None:
    """Every entry point of the kernels against its twin on the CPU."""
    failed, twins = [], torch.device("cpu")
    for setting, all_here, all_there in (
        (str(SMALL), cases(SMALL, device), cases(SMALL, twins)),
        ("every entry point", variants(device), variants(twins)),
    ):
        for here, there in zip(all_here, all_there, strict=True):
            same = _equal(here, here.run(), there.run())
            emit(setting, here.name, "equal to the CPU's", float(same))
            if not same:
                failed.append(here.name)
    if failed:
        raise SystemExit(f"differ from the CPU: {', '.join(failed)}")


def _equal(case: Case, here: Sequence[Tensor], there: Sequence[Tensor]) -> bool:
    away = 0.0 if case.exact else ROUNDING
    pairs = zip(here, there, strict=True)
    return all(torch.allclose(a.cpu().double(), b.double(), rtol=away, atol=away) for a, b in pairs)


def speed(device: torch.device) -> None:
    """Every kernel's time, in percent of a large copy."""
    size = LARGE if device.type == "cuda" else SMALL
    ceiling = copy_ceiling(device)
    emit("large copy", "torch", "bytes per second", ceiling, "B/s")
    for case in cases(size, device):
        taken = seconds(case.run, device)
        emit(str(size), case.name, "time", 1e6 * taken, "us")
        if case.bytes_moved:
            emit(str(size), case.name, "of the copy", 100 * case.bytes_moved / taken / ceiling, "%")


def memcheck(device: torch.device) -> None:
    """The smoke test again under compute-sanitizer, if that is installed: no kernel reads or writes out of bounds."""
    tool = shutil.which("compute-sanitizer") if device.type == "cuda" else None
    emit("smoke", "compute-sanitizer memcheck", "ran", float(tool is not None))
    if tool is None:
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--step", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"memcheck found errors:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


STEPS: dict[str, tuple[Callable[..., None], int]] = {
    "smoke": (smoke, 60),
    "exact": (exact, 120),
    "symmetric": (exact_symmetric, 60),
    "layers": (layers, 90),
    "speed": (speed, 60),
    "virtual": (symmetric_speed, 40),
    "train": (train, 70),
    "memcheck": (memcheck, 60),
}
"""Name -> the step and its limit in seconds on a GPU, in the order in which they run."""
SLOW = 10
"""How much longer steps may take in a dry run."""


def run_step(name: str, device: str, limit: int, report: Report, path: Path) -> str:
    """Run a step in a process of its own; returns what became of it."""
    command = [sys.executable, __file__, "--step", name, "--device", device, "--json", str(path)]
    step = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    cut = threading.Timer(limit, os.killpg, (step.pid, signal.SIGKILL))  # with the ranks that it started
    cut.start()
    assert step.stdout is not None
    for line in step.stdout:
        row = json.loads(line)
        report.add(**row)
        report.write(path)
        print(f"{row['subject']:32} {row['metric']:24} {row['value']:14.4g} {row['unit']}", flush=True)
    code = step.wait()
    late = not cut.is_alive()
    cut.cancel()
    return "passed" if code == 0 else f"cut after {limit} s" if late else "failed"


def default_path(device: str) -> Path:
    """Results file with device and date in its name."""
    model = re.search(r"\b[A-Z]+\d+", torch.cuda.get_device_name()) if device == "cuda" else None
    name = model[0].lower() if model else device
    return Path(__file__).parent / "results" / f"gpu_check_{name}_{datetime.now(timezone.utc):%Y-%m-%d}.json"


def describe(report: Report, device: str) -> None:
    """What a figure depends on besides packages, as rows: the driver's and CUDA's versions."""
    if device == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[0]
        report.add(torch.cuda.get_device_name(), f"driver {driver}", "major version", float(driver.partition(".")[0]))
        report.add(torch.cuda.get_device_name(), "CUDA of torch", "version", float(torch.version.cuda or 0))


def judge(report: Report, path: Path, on_gpu: bool) -> None:
    """Print which goals were reached; add this to the results. A dry run's figures say nothing of a GPU."""
    found = verdicts(report.rows)
    for verdict in found if on_gpu else ():
        if verdict.worst is not None:
            report.add(str(verdict.goal), "to show", verdict.word, verdict.worst)
    report.write(path)
    print("" if on_gpu else "dry run: these are figures of a CPU, and say nothing of the goals")
    print(table(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; returns 0 if all passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="results; default: benchmarks/results/gpu_check_DEVICE_DATE.json")
    parser.add_argument("--seconds", type=int, default=400, help="limit of all steps together, on a GPU")
    parser.add_argument("--step", choices=tuple(STEPS), help="run this step in this process (for its own use)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.step:
        reason_against("hecate", device)
        step = STEPS[options.step][0]
        trace = options.json and options.json.with_suffix(".trace.json.gz")
        step(device, trace) if step is train else step(device)
        return 0
    try:
        reason_against("hecate", device)
    except RuntimeError as error:
        print(f"nothing was measured: {error}")
        return 2
    slow = 1 if options.device == "cuda" else SLOW
    path, report, end = (
        options.json or default_path(options.device),
        Report(),
        time.monotonic() + slow * options.seconds,
    )
    describe(report, options.device)
    outcome = {}
    for name, (_, limit) in STEPS.items():
        left = int(end - time.monotonic())
        outcome[name] = (
            run_step(name, options.device, min(slow * limit, left), report, path) if left > 0 else "not reached"
        )
    judge(report, path, on_gpu=options.device == "cuda")
    print("; ".join(f"{name}: {what}" for name, what in outcome.items()))
    return int(any(what != "passed" for what in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
