"""Time to plan one layer ahead and to find the routes of its copies.

    python -m benchmarks.planning_time --json benchmarks/results/planning_time.json [--against COMMIT [--native FILE]]

Milliseconds of CPU time of one thread, without caches: copies planned from 5 steps of drifting loads for two memory
slots a device, anywhere or at most 16 experts from outside a node of 8; and the routes of two copies a device. With
`--against`, processes of this commit and of another one take turns; ratios are medians over the rounds.
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

SETTINGS = ("8x64", "8x256", "64x64", "64x256", "256x64", "256x256")
THIS, OTHER = "this commit", "other commit"

Round = Mapping[str, Mapping[str, float]]


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--against", metavar="COMMIT", help="another commit to measure in turn")
    parser.add_argument("--native", type=Path, metavar="FILE", help="its native extension, if it is built already")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="calls per setting and round; the fastest one counts")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="DEVICESxEXPERTS")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = {THIS: working_tree(Path(folder) / "this")}
        if arguments.against:
            trees[OTHER] = checkout(arguments.against, Path(folder) / "other", arguments.native)
        rounds: dict[str, list[Round]] = {name: [] for name in trees}
        for _ in range(arguments.rounds):
            for name, tree in trees.items():
                rounds[name].append(one_round(tree, arguments.repeats, arguments.settings))
    report = summary(rounds)
    print(*(report.table(metric) for metric in dict.fromkeys(row.metric for row in report.rows)), sep="\n\n")
    if arguments.json:
        report.write(arguments.json)


def one_round(tree: Path, repeats: int, settings: Sequence[str]) -> Round:
    """Setting -> part -> milliseconds, from a process that imports the package of `tree`."""
    return json.loads(output_of(tree, Path(__file__).with_name("planning_time_round.py"), [str(repeats), *settings]))


def summary(rounds: Mapping[str, Sequence[Round]]) -> Report:
    """Medians over the rounds, and ratios of the other commit to this one within each round."""
    report = Report()
    for setting, parts in rounds[THIS][0].items():
        words = "D={} E={}".format(*setting.split("x"))
        for part in parts:
            for name, found in rounds.items():
                report.add(words, name, part, median(each[setting][part] for each in found), "ms")
            if OTHER in rounds:
                pairs = zip(rounds[OTHER], rounds[THIS], strict=True)
                report.add(words, "other / this", part, median(a[setting][part] / b[setting][part] for a, b in pairs))
    return report


if __name__ == "__main__":
    main()
