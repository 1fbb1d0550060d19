"""Training steps of all systems side by side, as a share of the force-balanced ceiling.

    python -m benchmarks.end_to_end --json FILE [key=value ...]     # keys of conf/config.yaml, e.g. devices=4
    python -m benchmarks.end_to_end --quick                         # ep, balanced, fsdp2 and the ceiling
    python -m benchmarks.end_to_end --cluster --json FILE           # on 2 emulated nodes of 4 devices
    python -m benchmarks.end_to_end --cluster --nodes 4 --inter-mbit 100 --cpu 0.1

The ceiling is plain expert parallelism with a router that loads all devices alike. All systems train the same model on
the same batches in the same processes, and take steps in turn; each skew gives all of them the same choices. Figures
are medians over the rounds; ratios are taken within a round. Their spread is the distance of the quartiles. Seconds by
kind are from one more step under torch's profiler (see benchmarks/timeline.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import cluster
from benchmarks.links import cost_of
from benchmarks.report import Report, command_line
from benchmarks.side_by_side import (
    Options,
    add_options,
    close,
    measure,
    options_of,
    report_on,
    resolved,
    start,
)
from benchmarks.skews import KINDS
from benchmarks.systems import CEILING, OUTSIDE
from benchmarks.timeline import draw
from hecate.train.distributed import World, launch

EVERY = "reshard_interval=20"
SYSTEMS = ("ep", "hecate", "balanced", "fastermoe", f"smartmoe:{EVERY}", f"flexmoe:{EVERY}", "exact", *OUTSIDE)
SKEWS = ("own", "zipf:1.2:beside", "none")
QUICK = (("ep", "balanced", "fsdp2"), ("zipf:1.2:beside",))
ON_TWO = (
    "model.d_model=512",
    "model.num_layers=1",
    "model.num_heads=8",
    "model.num_experts=16",
    "batch_size=8",
    "devices=2",
)
"""2048 tokens per device, experts of width 1024."""

ON_CLUSTER = (
    "model.d_model=256",
    "model.num_layers=2",
    "model.num_experts=32",
    "batch_size=2",
    "timeout_seconds=600",
)
"""512 tokens per device, experts of width 512: the exchange of tokens dominates."""

NODES, PER_NODE, INTER_MBIT, CPU = 2, 4, 400, 0.22
SHAPE = ("nodes", "devices_per_node", "inter_mbit", "cpu")
TABLES = ("tokens_per_second", "percent_of_ceiling", "percent_of_ceiling_spread", "over_ep", "imbalance_after")


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=30, warm_up=8)
    parser.add_argument(
        "--systems",
        "--policies",
        help=f"with commas between: {', '.join(OUTSIDE)}, or policies; NAME:KEY=VALUE is one with a setting of fssdp, "
        f"as balanced:reshard_interval=20 (default: {','.join(SYSTEMS)})",
    )
    parser.add_argument("--skew", action="append", help=f"{', '.join(KINDS)}; may be repeated (default: {SKEWS})")
    parser.add_argument("--quick", action="store_true", help="three systems, one skew, under 4 minutes")
    parser.add_argument("--cluster", action="store_true", help="on emulated nodes, of the shape in the next options")
    parser.add_argument("--nodes", type=int, default=NODES, help="(default: %(default)s)")
    parser.add_argument("--devices-per-node", type=int, default=PER_NODE, help="(default: %(default)s)")
    parser.add_argument(
        "--inter-mbit", type=int, default=INTER_MBIT, help="Mbit/s between nodes (default: %(default)s)"
    )
    parser.add_argument("--cpu", type=float, default=CPU, help="cores per device (default: %(default)s)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write bars, timelines and Chrome traces")
    given = parser.parse_intermixed_args()
    systems, skews = QUICK if given.quick else (SYSTEMS, SKEWS)
    try:
        options = options_of(given, given.systems.split(",") if given.systems else systems, given.skew or skews)
    except ValueError as error:
        parser.error(str(error))
    if given.cluster:
        nodes, per_node, inter_mbit, cpu = (getattr(given, name) for name in SHAPE)
        return on_cluster("benchmarks.end_to_end", (nodes, per_node, inter_mbit, cpu), ON_CLUSTER)
    for name in SHAPE if given.where is None else ():
        if (value := getattr(given, name)) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} {value}: is of an emulated cluster; needs --cluster")
    config = resolved([*(ON_TWO if given.where is None else ()), *given.overrides])
    launch(config, partial(run, options=options, file=given.json, plots=given.plots))
    return 0


def on_cluster(program: str, shape: tuple[int, int, int, float], overrides: Sequence[str]) -> int:
    """Run this command again on every rank of an emulated cluster; returns its exit code, 77 if that cannot be made.

    Before, the cluster's cost model is measured there by benchmarks.links, unless the command line has `fssdp.cost=`.

    Args:
        program: module to run.
        shape: nodes, devices per node, Mbit/s between nodes, cores per device.
        overrides: defaults of the configuration, without `devices`; those of the command line come later.
    """
    nodes, per_node, mbit, cpu = shape
    where = f"emulated {nodes} x {per_node}, {mbit} Mbit/s, {cpu} core each"
    own = [word for word in sys.argv[1:] if word != "--cluster"]
    overrides = [*overrides, f"devices={nodes * per_node}"]
    cluster.tear_down_on_signals()
    try:
        with TemporaryDirectory() as folder, cluster.emulated(nodes, per_node, mbit, cpu) as ranks:
            cost = [] if any(word.startswith("fssdp.cost=") for word in own) else cost_of(ranks, folder)
            named = ["--where", where, "--command", command_line()]
            return cluster.run([sys.executable, "-m", program, *named, *overrides, *cost, *own], ranks)
    except cluster.MissingError as missing:
        print(f"{program}: an emulated cluster needs {missing}", file=sys.stderr)
        return cluster.SKIPPED


def run(config: Mapping[str, Any], world: World, options: Options, file: Path | None, plots: Path | None) -> None:
    """One rank's part; rank 0 reports."""
    options = replace(options, systems=tuple(dict.fromkeys((CEILING, *options.systems))))
    systems = start(config, world, options)
    report, where = Report(), options.where or f"{world.size} processes"
    task = next(iter(systems.values())).task
    for name, value in asdict(task.settings.fssdp.cost_model(world.device.type)).items():
        report.add(where, "cost model", name, value)
    for number, skew in enumerate(options.skews):
        found = measure(systems, world, options, skew, number * (options.warm_up + options.rounds + 1))
        setting = f"{where}, {skew}"
        report_on(report, found, setting, task.tokens_per_step)
        if plots is not None and world.rank == 0:
            draw(found.timelines, f"one step of rank 0, {setting}", plots / skew.replace(":", "_").replace("/", "_"))
    close(systems.values())
    if world.rank == 0:
        finish(report, options.command, file, plots)


def finish(report: Report, command: str | None, file: Path | None, plots: Path | None) -> None:
    """Print the tables; write the JSON and the bars."""
    print(*(report.table(metric) for metric in TABLES), sep="\n\n")
    if file is not None:
        report.write(file, command)
    if plots is not None:
        bars(report, "percent_of_ceiling", plots / "percent_of_ceiling.png")


def bars(report: Report, metric: str, path: Path) -> None:
    """A group of bars per setting, one bar per system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.rows if row.metric == metric]
    settings, subjects = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("setting", "subject"))
    figure, axes = pyplot.subplots(figsize=(2 + 0.6 * len(settings) * len(subjects), 4), layout="constrained")
    for place, subject in enumerate(subjects):
        values = {row.setting: row.value for row in rows if row.subject == subject}
        at = [i + place * 0.8 / len(subjects) for i in range(len(settings))]
        axes.bar(at, [values.get(setting, 0.0) for setting in settings], 0.8 / len(subjects), label=subject)
    axes.set_xticks([i + 0.4 for i in range(len(settings))], settings)
    axes.set_ylabel(metric.replace("_", " "))
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
