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
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.report import Report
from benchmarks.trees import checkout, output_of, working_tree

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
        trees = {THIS: working_tree(Path(folder) / "this")}
        if arguments.against:
            trees[OTHER] = checkout(arguments.against, Path(folder) / "other", arguments.native)
        rounds: dict[str, list[Round]] = {name: [] for name in trees}
        for _ in range(arguments.rounds):
            for name, tree in trees.items():
                rounds[name].append(measured(tree, arguments.passes, arguments.settings))
    report = summarize(rounds, arguments.settings)
    print(*(report.table(metric) for metric in dict.fromkeys(row.metric for row in report.rows)), sep="\n\n")
    if arguments.json:
        report.write(arguments.json)


def measured(tree: Path, passes: int, settings: Sequence[str]) -> Round:
    """Nanoseconds by setting and part, measured by one process that imports `hecate` from `tree`."""
    printed = output_of(tree, Path(__file__).with_name("host_rank.py"), [str(passes), *settings])
    return json.loads(printed.splitlines()[-1])


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
