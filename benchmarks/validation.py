"""Simulated against measured step times, on the emulated cluster.

    python -m benchmarks.validation --json benchmarks/results/validation.json       # all cases, some 12 minutes
    python -m benchmarks.validation --short                                         # 8 cases

The ranks measure a profile of the cluster first, as `hecate.sim.measure` does. Two cases (narrow model, even router,
expert parallelism and copies planned ahead) give what single measurements do not show: the fixed time of a layer
(hooks, autograd, waiting for a share of a core), and the host time of a layer's copies.
All other cases use that profile unchanged. The simulator gets the loads that the routers really gave.
If the machine cannot emulate a cluster, it prints one line and exits with code 77.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.cluster import SKIPPED, MissingError, Rank, emulated, loopback, run, tear_down_on_signals
from benchmarks.report import Report
from benchmarks.validation_rank import CALIBRATION, POLICIES, SHAPES, SKEWS, WITH_COPIES, config_of
from hecate.loads.trace import Trace
from hecate.placement import Topology
from hecate.policies import get_policy
from hecate.sim.cluster import Cluster
from hecate.sim.conf import cluster_named
from hecate.sim.model import ModelShape
from hecate.sim.run import Result, simulate, with_tokens
from hecate.sim.settings import Precision, Settings

NODES, PER_NODE = 2, 2
PROFILE, RESULTS = "profile.json", "results.json"
APART = 1.05
"""Pairs of cases whose measured times differ by more than this must be ranked right."""
MILLISECOND = 1_000_000
WARM_UP = 3
"""Steps of each case before those that count: then copies are planned from a history."""
SHORT = {"shapes": ["narrow", "wide"], "skews": ["even", "zipf 1.2"], "policies": ["ep", "balanced, ahead"]}


def main() -> int:
    """Parse, measure, simulate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--short", action="store_true", help="8 cases of 5 steps, and a rougher profile")
    parser.add_argument("--rounds", type=int, help="steps of each case that count (default 8; 5 with --short)")
    parser.add_argument("--inter-mbit", type=int, default=200)
    parser.add_argument(
        "--cpu",
        type=float,
        default=0.4,
        help="CPU share of each rank, in cores (default: %(default)s)",
    )
    parser.add_argument("--keep", type=Path, help="folder for the profile and what was measured")
    parser.add_argument("--kept", type=Path, help="simulate what --keep has kept, and measure nothing")
    parser.add_argument("--loopback", action="store_true", help="without emulation: no limits, as a try")
    arguments = parser.parse_args()
    tear_down_on_signals()
    rounds = arguments.rounds or (5 if arguments.short else 8)
    cases = SHORT if arguments.short else {"shapes": [*SHAPES], "skews": [*SKEWS], "policies": _policies()}
    try:
        with ExitStack() as stack:
            folder = arguments.kept or arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if arguments.kept is None:
                folder.mkdir(parents=True, exist_ok=True)
                place = emulated(NODES, PER_NODE, arguments.inter_mbit, arguments.cpu)
                ranks = loopback(NODES, PER_NODE) if arguments.loopback else stack.enter_context(place)
                measure(ranks, folder, cases, rounds, repeats=4 if arguments.short else 7)
            report = compared(*read(folder))
    except MissingError as missing:
        print(f"benchmarks.validation: this machine lacks {missing}", file=sys.stderr)
        return SKIPPED
    for metric in dict.fromkeys(row.metric for row in report.rows):
        print(report.table(metric), end="\n\n")
    if arguments.json:
        report.write(arguments.json)
    return 0


def _policies() -> list[str]:
    """Those whose policy exists."""
    found = []
    for name, changes in POLICIES.items():
        try:
            get_policy(str(changes["policy"]))
        except ValueError:
            continue
        found.append(name)
    return found


def measure(ranks: Sequence[Rank], folder: Path, cases: Mapping[str, Sequence[str]], rounds: int, repeats: int) -> None:
    """Measure a profile, then train all cases; RuntimeError if a rank fails.

    Args:
        ranks: where to run.
        folder: for the files that `read` reads.
        cases: shapes, skews and policies.
        rounds: steps of each case that count.
        repeats: of each measurement of the profile.
    """
    profile, out = (str(folder / name) for name in (PROFILE, RESULTS))
    settings = {"profile": profile, "out": out, "repeats": repeats, "rounds": rounds, "warm_up": WARM_UP, **cases}
    code = run([sys.executable, "-m", "benchmarks.validation_rank", json.dumps(settings)], ranks, late=True)
    if code:
        raise RuntimeError(f"benchmarks.validation_rank: exit code {code}")


def read(folder: Path) -> tuple[list[dict[str, Any]], Cluster]:
    """What `measure` has measured: the cases, and the profile."""
    return json.loads((folder / RESULTS).read_text()), cluster_named(str(folder / PROFILE))


def shape_of(shape: str) -> ModelShape:
    """What the simulator knows of the model of a shape."""
    config, values = config_of(shape), SHAPES[shape]
    d, experts = config.d_model, config.num_experts
    return ModelShape(
        name=shape,
        num_layers=config.num_layers,
        d_model=d,
        num_experts=experts,
        top_k=config.top_k,
        expert_weights=2 * config.expert_ratio * d * d,
        dense_weights=4 * d * d + experts * d + 4 * d,
        outer_weights=2 * config.vocab_size * d + 2 * d,
        head_weights=config.vocab_size * d,
        heads=d,
        sequence_length=values["length"],
        checkpoint=False,
    )


def simulated(case: Mapping[str, Any], cluster: Cluster) -> Result:
    """The same steps, with the loads that were measured."""
    counts = np.array(case["counts"], dtype=np.int64)  # [steps, layers, D, E]
    warm_up = len(counts) - len(case["seconds"])
    layers = tuple(np.ascontiguousarray(counts[:, layer]) for layer in range(counts.shape[1]))
    trace = Trace(Topology(cluster.devices, cluster.devices_per_node), np.arange(len(counts)), layers)
    model, changes = shape_of(case["shape"]), dict(POLICIES[case["policy"]])
    settings = Settings(precision=Precision(4, 4, 4, 2), reshard_interval=0, **changes)
    settings = with_tokens(settings, trace, model, cluster)
    return simulate(model, cluster, settings, trace, len(case["seconds"]), warm_up)


def seconds(case: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> float:
    """A case's step on the machine as it was when the first case, the yardstick, was measured.

    The machine's speed changes within minutes, so the yardstick takes steps in turn with all cases.
    """
    yardstick = next(other for other in results if _names(other) == CALIBRATION)
    return median(case["seconds"]) * median(yardstick["seconds"]) / median(case["yardstick"])


def calibrated(results: Sequence[Mapping[str, Any]], cluster: Cluster) -> Cluster:
    """The cluster with the `layer_ns` and the `copies_ns` by which the two calibrations take as long as measured."""
    for names, field in ((CALIBRATION, "layer_ns"), (WITH_COPIES, "copies_ns")):
        case = next((case for case in results if _names(case) == names), None)
        if case is None:
            continue
        for _ in range(4):
            value, now = getattr(cluster, field), simulated(case, cluster).step_ns
            more = simulated(case, replace(cluster, **{field: value + MILLISECOND})).step_ns - now
            missing = int(seconds(case, results) * 1e9) - now
            cluster = replace(cluster, **{field: max(0, value + missing * MILLISECOND // max(1, more))})
    return cluster


def _names(case: Mapping[str, Any]) -> tuple[str, str, str]:
    return case["shape"], case["skew"], case["policy"]


def compared(results: Sequence[Mapping[str, Any]], cluster: Cluster) -> Report:
    """The table: measured and simulated times, their errors, the ranking, and memory."""
    cluster = calibrated(results, cluster)
    report = Report()
    errors, times = [], []
    for case in results:
        found = simulated(case, cluster)
        setting = f"{case['shape']}, {case['skew']}, {case['policy']}"
        own, theirs = found.step_ns / 1e6, seconds(case, results) * 1e3
        report.add(setting, "measured", "milliseconds", theirs, "ms")
        report.add(setting, "simulated", "milliseconds", own, "ms")
        if _names(case) not in (CALIBRATION, WITH_COPIES):
            report.add(setting, "simulated", "error", own / theirs - 1)
            errors.append(abs(own / theirs - 1))
        times.append((case["shape"], theirs, own))
        for kind in ("owned", "optimizer", "gradients", "copies"):
            report.add(f"{setting}, {kind}", "measured", "kilobytes", case["memory"][kind] / 1e3, "kB")
            report.add(f"{setting}, {kind}", "simulated", "kilobytes", getattr(found.memory, kind) / 1e3, "kB")
    if errors:
        report.add("all cases but the calibrations", "simulated", "mean error", mean(errors))
        report.add("all cases but the calibrations", "simulated", "worst error", max(errors))
    pairs = [(a, b) for a, b in combinations(times, 2) if a[0] == b[0] and max(a[1], b[1]) > APART * min(a[1], b[1])]
    right = sum((a[1] < b[1]) == (a[2] < b[2]) for a, b in pairs)
    if pairs:
        report.add("pairs of one shape more than 5 % apart", "simulated", "ranked right", right / len(pairs))
    return report


if __name__ == "__main__":
    sys.exit(main())
