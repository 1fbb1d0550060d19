"""Host time of one MoE layer: from the counts the host waits for to the launch of the all-to-all, and more.

    python -m benchmarks.host --json benchmarks/results/host.json [--against COMMIT [--native FILE]]

On one CPU thread, with a process group that sends nothing and few tokens of eight numbers, so that what remains is the
host's work: planning, bookkeeping and calls of ops. Times are of the thread, without those in which it does not run.

With `--against`, processes of this commit and of another one take turns, and ratios are medians over the rounds. The
other commit's native extension is built from its source, unless `--native` names one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median

from benchmarks.report import Report

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tuple(f"{devices}x{experts}" for devices in (8, 64, 256) for experts in (64, 256))
PARTS = (
    "calibrate",
    "assign",
    "exchange choice",
    "dispatch record",
    "bubble",
    "gate to all-to-all",
    "forward",
    "backward",
    "book",
)
"""What `benchmarks.host_rank` measures. Bubble: counts known until the rows' all-to-all is called. Gate to all-to-all:
the same with the counts' exchange before it. Forward and backward: all of the layer."""
THIS, OTHER = "this commit", "before"

Round = Mapping[str, Mapping[str, float]]


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--native", type=Path, metavar="FILE", help="extension of the other commit, already built")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=10, help="per setting and round")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="DEVICESxEXPERTS")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = {THIS: ROOT}
        if arguments.against:
            trees = {OTHER: checkout(arguments.against, Path(folder), arguments.native), THIS: ROOT}
        rounds: dict[str, list[Round]] = {name: [] for name in trees}
        for _ in range(arguments.rounds):
            for name, tree in trees.items():
                rounds[name].append(run(tree, arguments.passes, arguments.settings))
    report = summarize(rounds, arguments.settings)
    print(*(report.table(metric) for metric in dict.fromkeys(row.metric for row in report.rows)), sep="\n\n")
    if arguments.json:
        report.write(arguments.json)


def checkout(commit: str, folder: Path, native: Path | None) -> Path:
    """Write the files of `commit` to `folder`, with its native extension."""
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    name = next((ROOT / "hecate").glob("_native*.so")).name
    shutil.copy(build(folder) if native is None else native, folder / "hecate" / name)
    return folder


def build(folder: Path) -> Path:
    """Build the native extension of a checkout."""
    made = folder / "build"
    words = ["cmake", "-S", str(folder), "-B", str(made), f"-DPython_EXECUTABLE={sys.executable}"]
    for command in ([*words, "-DCMAKE_BUILD_TYPE=Release"], ["cmake", "--build", str(made)]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(made.glob("_native*.so"))


def run(tree: Path, passes: int, settings: Sequence[str]) -> Round:
    """Nanoseconds by setting and part, measured by one process that imports `hecate` from `tree`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "host_rank.py"), str(passes), *settings]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarize(rounds: Mapping[str, Sequence[Round]], settings: Sequence[str]) -> Report:
    """Medians over the rounds, and if there are two commits their ratios within each round."""
    report = Report()
    for part in PARTS:
        for setting in settings:
            devices, experts = setting.split("x")
            words = f"{devices} devices, {experts} experts"
            for name, found in rounds.items():
                report.add(words, name, part, median(r[setting][part] for r in found) / 1e3, "us")
            if OTHER in rounds:
                pairs = zip(rounds[OTHER], rounds[THIS], strict=True)
                report.add(words, "ratio", part, median(a[setting][part] / b[setting][part] for a, b in pairs))
    return report


if __name__ == "__main__":
    main()
