"""Copies of the package as of two commits, and processes that import it from one of them: to time old beside new."""

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
from hecate import _native

__all__ = ["measured", "options", "report_of"]

ROOT = Path(__file__).parents[1]

SETTINGS = tuple(f"{devices}x{experts}" for devices in (8, 64, 256) for experts in (64, 256))
THIS, OTHER = "this commit", "before"

Round = Mapping[str, Mapping[str, float]]
"""Setting -> part -> time, as one process measures it."""

RUN = """
import runpy, sys
tree, program, *sys.argv[1:] = sys.argv[1:]
# An editable installation of the package comes before all paths.
sys.meta_path = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, tree)
import hecate
assert hecate.__file__.startswith(tree), f"hecate was imported from {hecate.__file__}, must be from {tree}"
runpy.run_path(program, run_name="__main__")
"""


def working_tree(folder: Path) -> Path:
    """Copy the package as it is now to `folder`, with the native extension that is installed."""
    shutil.copytree(ROOT / "hecate", folder / "hecate", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(_native.__file__, folder / "hecate")
    return folder


def checkout(commit: str, folder: Path, native: Path | None = None) -> Path:
    """Write the package as of `commit` to `folder`, with its native extension; `native` is one built before."""
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    shutil.copy(_built(folder) if native is None else native, folder / "hecate" / Path(_native.__file__).name)
    return folder


def _built(folder: Path) -> Path:
    made = folder / "build"
    configure = ["cmake", "-S", str(folder), "-B", str(made), f"-DPython_EXECUTABLE={sys.executable}"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in ([*configure, "-DCMAKE_BUILD_TYPE=Release"], ["cmake", "--build", str(made)]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return next(made.glob("_native*.so"))


def output_of(tree: Path, program: Path, arguments: Sequence[str]) -> str:
    """What `program` prints, in a process of one thread that imports the package from `tree`."""
    command = [sys.executable, "-c", RUN, str(tree), str(program), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout


def options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark that times parts of the package in several settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--against", metavar="COMMIT", help="another commit, to measure in turn")
    parser.add_argument("--native", type=Path, metavar="FILE", help="its native extension, if it is built already")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="DEVICESxEXPERTS")
    return parser


def measured(program: str, times: int, given: argparse.Namespace) -> dict[str, list[Round]]:
    """Rounds of one process per tree, in turn; each runs `program` of this folder, whose last line is a round as JSON.

    Args:
        program: file name.
        times: how often it is to measure each setting.
        given: values of `options`.
    """
    with tempfile.TemporaryDirectory() as folder:
        trees = {THIS: working_tree(Path(folder) / "this")}
        if given.against:
            trees[OTHER] = checkout(given.against, Path(folder) / "other", given.native)
        rounds: dict[str, list[Round]] = {name: [] for name in trees}
        for _ in range(given.rounds):
            for name, tree in trees.items():
                printed = output_of(tree, Path(__file__).with_name(program), [str(times), *given.settings])
                rounds[name].append(json.loads(printed.splitlines()[-1]))
    return rounds


def report_of(rounds: Mapping[str, Sequence[Round]], unit: str, per_unit: float, parts: Sequence[str] = ()) -> Report:
    """Medians over the rounds, and if there are two commits the medians of the ratios within each round.

    Args:
        rounds: of `measured`.
        unit: unit of the reported times.
        per_unit: measured time of one unit.
        parts: the parts to report, in order; by default all.
    """
    report, (first, *_) = Report(), rounds[THIS]
    for setting in first:
        devices, experts = setting.split("x")
        words = f"{devices} devices, {experts} experts"
        for part in parts or first[setting]:
            for name, found in rounds.items():
                report.add(words, name, part, median(r[setting][part] for r in found) / per_unit, unit)
            if OTHER in rounds:
                pairs = zip(rounds[OTHER], rounds[THIS], strict=True)
                report.add(words, "ratio", part, median(a[setting][part] / b[setting][part] for a, b in pairs))
    print(*(report.table(metric) for metric in dict.fromkeys(row.metric for row in report.rows)), sep="\n\n")
    return report
