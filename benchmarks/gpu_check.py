"""Everything that needs a GPU in one command: whether the kernels are right on it, and how fast they are.

`make gpu-check`, or `python benchmarks/gpu_check.py --device cpu` for a dry run in which the kernels' code runs on the
CPU. Each step is a process with a time limit, and what it measured is in the JSON file as soon as it was measured. The
last line says what passed, what failed and what was not reached.

Speed is given in percent of the bytes per second of a large copy on the same device: the bytes that a kernel must read
and write at least, each counted once, over its time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

if __name__ == "__main__":  # started by its path from any folder: the installed hecate is found before the checkout's
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

import torch
from torch import Tensor

from benchmarks.gpu_kernels import Case, Size, cases
from benchmarks.report import Report, Row
from hecate.ops.kernels.cuda import use_kernels

SMALL = Size(tokens=67, top_k=3, experts=8, width=264, hidden=40, owned=3)
LARGE = Size(tokens=16384, top_k=8, experts=128, width=2048, hidden=768, owned=16)
ROUNDING = 2**-7
"""Two neighbouring numbers of bfloat16: the last bit of exp and erf may differ."""


def smoke(device: torch.device) -> None:
    """Every kernel once against its twin on the CPU."""
    failed = []
    for here, there in zip(cases(SMALL, device), cases(SMALL, torch.device("cpu")), strict=True):
        same = _equal(here, here.run(), there.run())
        emit(str(SMALL), here.name, "equal to the CPU's", float(same))
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
    elements = 2**29 if device.type == "cuda" else 2**20
    ceiling = copy_ceiling(elements, device)
    emit("large copy", "torch", "bytes per second", ceiling, "B/s")
    for case in cases(size, device):
        taken = seconds(case.run, device)
        emit(str(size), case.name, "time", 1e6 * taken, "us")
        if case.bytes_moved:
            emit(str(size), case.name, "of the copy", 100 * case.bytes_moved / taken / ceiling, "%")


def copy_ceiling(elements: int, device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of bfloat16 numbers."""
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def matmul(device: torch.device) -> None:
    """The ceiling of the experts' products: a large one in bfloat16."""
    n = 8192 if device.type == "cuda" else 128
    a, b = (torch.ones(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    emit(f"{n} x {n} x {n} in bfloat16", "torch", "operations per second", 2 * n**3 / seconds(lambda: a @ b, device))


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """Median time of `run`, after two runs that are not counted."""
    repeats = repeats if device.type == "cuda" else 1
    times = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end) / 1e3
        else:
            started = time.perf_counter()
            run()
            took = time.perf_counter() - started
        if i >= 2:
            times.append(took)
    return sorted(times)[len(times) // 2]


STEPS: dict[str, tuple[Callable[[torch.device], None], int]] = {
    "smoke": (smoke, 90),
    "matmul": (matmul, 60),
    "speed": (speed, 120),
}
"""Name -> the step and its limit in seconds, in the order in which they run."""


def emit(setting: str, subject: str, metric: str, value: float, unit: str = "") -> None:
    """Hand one figure to the process that collects them."""
    print(json.dumps(asdict(Row(setting, subject, metric, value, unit))), flush=True)


def run_step(name: str, device: str, limit: int, report: Report, path: Path) -> str:
    """Run a step in a process of its own; returns what became of it."""
    command = [sys.executable, __file__, "--step", name, "--device", device]
    step = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    cut = threading.Timer(limit, step.kill)
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
    """What a figure depends on, as rows: the driver's and CUDA's versions are numbers here."""
    if device == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(".")
        report.add(torch.cuda.get_device_name(), "driver", "major version", float(driver[0]))
        report.add(torch.cuda.get_device_name(), "CUDA of torch", "version", float(torch.version.cuda or 0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; returns 0 if all passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="results; default: benchmarks/results/gpu_check_DEVICE_DATE.json")
    parser.add_argument("--seconds", type=int, default=400, help="limit of all steps together")
    parser.add_argument("--step", choices=tuple(STEPS), help="run this step in this process (for its own use)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.step:
        use_kernels("hecate", device)
        STEPS[options.step][0](device)
        return 0
    try:
        use_kernels("hecate", device)
    except RuntimeError as error:
        print(f"nothing was measured: {error}")
        return 2
    path, report, end = options.json or default_path(options.device), Report(), time.monotonic() + options.seconds
    describe(report, options.device)
    outcome = {}
    for name, (_, limit) in STEPS.items():
        left = int(end - time.monotonic())
        outcome[name] = run_step(name, options.device, min(limit, left), report, path) if left > 0 else "not reached"
    print("; ".join(f"{name}: {what}" for name, what in outcome.items()))
    return int(any(what != "passed" for what in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
