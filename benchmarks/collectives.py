"""Sparse collectives beside plain sends, a broadcast per expert, dense collectives and the lower bound of the links.

    python -m benchmarks.collectives --json FILE

runs eight ranks on an emulated cluster (two nodes, `benchmarks.cluster`) and on plain loopback, and prints the required
figures beside the measured ones. Without root, iproute2 or cgroups the emulated part is skipped, and a message says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from benchmarks.cluster import MissingError, Rank, emulated, loopback, run, tear_down_on_signals
from benchmarks.collectives_rank import BOUND, BROADCAST, DENSE, OURS, PLAIN, PREDICTED, measure, measure_links
from benchmarks.exchange_rank import CHOSEN, PLAIN_EXCHANGE, SHARED, measure_tokens
from benchmarks.report import Report
from hecate.placement import Topology

NODES, PER_NODE, INTER_MBIT, CPU = 2, 4, 400, 0.22
EMULATED, LOOPBACK = "emulated", "loopback"
CHUNKS = [0.25, 1.0, 4.0, 16.0]
OFTENER = 15  # more repeats on loopback, which is fast: noise matters more there, and repeats cost little
CLAIMED = 4.0  # MiB, the chunk size of the claims
KINDS = ("one expert to all", "4 hottest to all", "2 slots spread", "random", "re-shard permutation")
COLLECTIVES = ("spAG", "spRS")


def main() -> int:
    """Measure, print, write JSON and a plot beside it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collectives", description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="file to write; the plot goes beside it")
    parser.add_argument("--chunks", type=float, nargs="+", default=CHUNKS, help="chunk sizes, MiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=(EMULATED, LOOPBACK))
    parser.add_argument("--rank-of", choices=(EMULATED, LOOPBACK), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        return as_rank(arguments)
    tear_down_on_signals()
    report = Report()
    code = measure_both(arguments, report)
    if code:
        return code
    for collective in COLLECTIVES:
        show_claims(report, collective)
    show_token_claims(report)
    print(*map(report.table, ("time", "exchange time", "figure")), sep="\n\n")
    report.write(arguments.json)
    plot(report, Path(arguments.json).with_suffix(".png"))
    return 0


def measure_both(arguments: argparse.Namespace, report: Report) -> int:
    """Run the ranks; returns their exit code."""
    if arguments.only != LOOPBACK:
        try:
            with emulated(NODES, PER_NODE, INTER_MBIT, CPU) as ranks:
                code = measure_on(ranks, EMULATED, arguments, report)
        except MissingError as missing:
            print(f"benchmarks.collectives: no emulated cluster, this machine lacks {missing}", file=sys.stderr)
            code = 0
        if code:
            return code
    return 0 if arguments.only == EMULATED else measure_on(loopback(1, NODES * PER_NODE), LOOPBACK, arguments, report)


def measure_on(ranks: Sequence[Rank], where: str, arguments: argparse.Namespace, report: Report) -> int:
    """Run this module once per rank, and add the rows that rank 0 wrote to the report."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "rows.json"))
        options = ["--json", file, "--repeats", str(arguments.repeats), "--rank-of", where]
        options += ["--chunks", *map(str, arguments.chunks)]
        code = run([sys.executable, "-W", "ignore::FutureWarning", "-m", "benchmarks.collectives", *options], ranks)
        if code == 0:
            for row in json.loads(Path(file).read_text())["rows"]:
                report.add(**row)
    return code


def as_rank(arguments: argparse.Namespace) -> int:
    """One rank's part; rank 0 writes the rows."""
    dist.init_process_group("gloo")
    report = Report()
    topology = Topology.detect(dist.get_world_size())
    links, best = measure_links(topology)
    repeats = arguments.repeats * (OFTENER if arguments.rank_of == LOOPBACK else 1)
    measure(report, arguments.rank_of, topology, links, best, arguments.chunks, repeats)
    measure_tokens(report, arguments.rank_of, topology, links, repeats)
    if dist.get_rank() == 0:
        report.write(arguments.json)
    dist.destroy_process_group()
    return 0


# Claims.


def show_claims(report: Report, collective: str) -> None:
    """Add the required figures, and the measured ones."""
    time = {(row.setting, row.subject): row.value for row in report.rows if row.metric == "time"}

    def ratio(where: str, kind: str, over: str, under: str) -> float | None:
        setting = f"{where}, {collective}, {kind}, {CLAIMED:g} MiB"
        pair = time.get((setting, over)), time.get((setting, under))
        return None if pair[0] is None or not pair[1] else pair[0] / pair[1]

    def show(what: str, asked: float, found: float | None) -> None:
        if found is not None:
            report.add(what, "to show", "figure", asked)
            report.add(what, "measured", "figure", found)

    for kind in KINDS:
        show(f"{collective}, {kind}: ours / bound, at most", 1.4, ratio(EMULATED, kind, OURS, BOUND))
    show(f"{collective}, one expert to all: plain / ours, at least", 2.5, ratio(EMULATED, KINDS[0], PLAIN, OURS))
    show(f"{collective}, 2 slots spread: dense / ours, at least", 3.0, ratio(EMULATED, KINDS[2], DENSE, OURS))
    for kind in KINDS:
        others = [ratio(LOOPBACK, kind, OURS, other) for other in (PLAIN, BROADCAST, DENSE)]
        best = max((r for r in others if r is not None), default=None)
        show(f"{collective}, {kind}, loopback: ours / best other, at most", 1.1, best)


def show_token_claims(report: Report) -> None:
    """Add the required and the measured figures of the token exchange."""
    time = {(row.setting, row.subject): row.value for row in report.rows if row.metric == "exchange time"}
    for where, what, asked in (
        (EMULATED, "plain / ours, at least", 1.5),
        (LOOPBACK, "plain / ours, at least", 1 / 1.1),
    ):
        setting = f"{where}, tokens, {SHARED}"
        if (setting, CHOSEN) in time:
            report.add(f"{setting}: {what}", "to show", "figure", asked)
            report.add(
                f"{setting}: {what}", "measured", "figure", time[setting, PLAIN_EXCHANGE] / time[setting, CHOSEN]
            )


def plot(report: Report, path: Path) -> None:
    """Plot time by chunk size, with one panel per collective, placement kind and network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    time = {(row.setting, row.subject): row.value for row in report.rows if row.metric == "time"}
    networks = [w for w in (EMULATED, LOOPBACK) if any(setting.startswith(w) for setting, _ in time)]
    rows = [(network, collective) for network in networks for collective in COLLECTIVES]
    figure, axes = pyplot.subplots(len(rows), len(KINDS), figsize=(16, 3.2 * len(rows)), layout="constrained")
    for line, (network, collective) in zip(axes, rows, strict=True):
        for panel, kind in zip(line, KINDS, strict=True):
            for subject in (OURS, PLAIN, BROADCAST, DENSE, PREDICTED, BOUND):
                points = _points(time, f"{network}, {collective}, {kind}, ", subject)
                style = "k--" if subject == BOUND else "k:" if subject == PREDICTED else "o-"
                panel.plot([x for x, _ in points], [y for _, y in points], style, label=subject)
            panel.set(xscale="log", yscale="log", title=f"{network}, {collective}\n{kind}", xlabel="MiB", ylabel="s")
            sizes = [x for x, _ in _points(time, f"{network}, {collective}, {kind}, ", OURS)]
            panel.set_xticks(sizes, [f"{x:g}" for x in sizes], minor=False)
            panel.minorticks_off()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path)


def _points(time: dict[tuple[str, str], float], prefix: str, subject: str) -> list[tuple[float, float]]:
    found = [(s.removeprefix(prefix), v) for (s, of), v in time.items() if of == subject and s.startswith(prefix)]
    return sorted((float(chunk.removesuffix(" MiB")), seconds) for chunk, seconds in found)


if __name__ == "__main__":
    sys.exit(main())
