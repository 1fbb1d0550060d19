"""Weak and strong scaling over emulated clusters: nodes of 4 devices, the same CPU share per device at every size.

    python -m benchmarks.scaling --json FILE [key=value ...]

Every size is a cluster of its own (benchmarks.cluster), on which benchmarks.end_to_end measures all systems side by
side. Weak: every device has `batch_size` sequences. Strong: the devices share those that the largest size has in weak
scaling. Efficiency is that of tokens per second per device over the smallest size. Figures of different sizes are from
different minutes; the share of the ceiling, measured in the same run, does not suffer from that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cluster
from benchmarks.end_to_end import ON_CLUSTER
from benchmarks.links import cost_of
from benchmarks.report import Report, Row
from benchmarks.side_by_side import add_options, options_of

SIZES = "1,2,4,8,16"
PER_NODE, INTER_MBIT, CPU = 4, 400, 0.11
SYSTEMS = "ep,balanced"
SKEW = "zipf:1.2"
KEPT = ("tokens_per_second", "percent_of_ceiling", "over_ep", "imbalance_before", "imbalance_after")


def main() -> int:
    """Parse, run every size, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=8, warm_up=4)
    parser.add_argument("--sizes", default=SIZES, help="devices, with commas between (default: %(default)s)")
    parser.add_argument("--kinds", default="weak,strong", help="of scaling, with commas between (default: %(default)s)")
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--skew", default=SKEW)
    parser.add_argument("--batch", type=int, default=2, metavar="SEQUENCES", help="per device, in weak scaling")
    parser.add_argument("--cpu", type=float, default=CPU, help="cores per device (default: %(default)s)")
    given = parser.parse_intermixed_args()
    try:
        options_of(given, given.systems.split(","), [given.skew])
        kinds, sizes = given.kinds.split(","), [int(size) for size in given.sizes.split(",")]
        batches = {(kind, size): batch_of(kind, size, max(sizes), given.batch) for kind in kinds for size in sizes}
    except ValueError as error:
        parser.error(str(error))
    cluster.tear_down_on_signals()
    report = Report()
    for (kind, size), batch in batches.items():
        try:
            rows = measured(size, batch, given)
        except cluster.MissingError as missing:
            print(f"benchmarks.scaling: an emulated cluster needs {missing}", file=sys.stderr)
            return cluster.SKIPPED
        report.rows += [Row(f"{kind}, {size} devices", r.subject, r.metric, r.value, r.unit) for r in rows]
    add_efficiency(report, kinds, sizes)
    print(*(report.table(metric) for metric in ("efficiency", *KEPT)), sep="\n\n")
    if given.json:
        report.write(given.json)
    return 0


def batch_of(kind: str, size: int, largest: int, batch: int) -> int:
    """Sequences per device, of which weak scaling has `batch`; ValueError if they cannot be divided equally."""
    if kind not in ("weak", "strong"):
        raise ValueError(f"--kinds {kind}: must be of weak, strong")
    if size < 1 or (size > PER_NODE and size % PER_NODE):
        raise ValueError(f"--sizes {size}: must be at least 1, and at most {PER_NODE} or a multiple of it")
    if kind == "weak":
        return batch
    total = batch * largest
    if total % size:
        raise ValueError(f"--sizes {size}: must divide the {total} sequences of strong scaling")
    return total // size


def measured(size: int, batch: int, given: argparse.Namespace) -> list[Row]:
    """One run of benchmarks.end_to_end on `size` devices; RuntimeError if it fails."""
    per_node = min(size, PER_NODE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        own = ["--json", str(file), "--rounds", str(given.rounds), "--warm-up", str(given.warm_up)]
        own += ["--model", given.model, "--systems", given.systems, "--skew", given.skew, "--where", f"{size} devices"]
        shape = [*ON_CLUSTER, f"devices={size}", f"batch_size={batch}", *given.overrides]
        with cluster.emulated(size // per_node, per_node, INTER_MBIT, given.cpu) as ranks:
            words = [sys.executable, "-m", "benchmarks.end_to_end", *own, *cost_of(ranks, folder), *shape]
            code = cluster.run(words, ranks)
        if code:
            raise RuntimeError(f"{' '.join(words)}: exit code {code}")
        rows = [Row(**row) for row in json.loads(file.read_text())["rows"]]
    return [row for row in rows if row.metric in KEPT]


def add_efficiency(report: Report, kinds: Sequence[str], sizes: Sequence[int]) -> None:
    """Tokens per second per device over those of the smallest size."""
    speed = {(r.setting, r.subject): r.value for r in report.rows if r.metric == "tokens_per_second"}
    least = min(sizes)
    for kind in kinds:
        for size in sizes:
            for subject in dict.fromkeys(subject for _, subject in speed):
                own, first = (speed.get((f"{kind}, {n} devices", subject)) for n in (size, least))
                if own is not None and first is not None:
                    report.add(f"{kind}, {size} devices", subject, "efficiency", (own / size) / (first / least))


if __name__ == "__main__":
    sys.exit(main())
