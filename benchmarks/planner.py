"""The planner's figures beside the published ones (ANCHORS): `python -m benchmarks.planner --json FILE`.

Measures quality and time for known loads; robustness of copies planned from the load history, also across nodes; every
policy on every kind of load; predictors on recorded traces; and re-sharding. Uses one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

import hecate
from benchmarks.planner_claims import CLAIMS, PUBLISHED, Claim
from benchmarks.report import Report
from hecate.cost import CostModel, LayerCost
from hecate.loads.predict import Predictor, predict
from hecate.loads.synthetic import synthetic_loads
from hecate.loads.trace import read_trace
from hecate.placement import Placement, Topology, initial_owners
from hecate.planning.calibrate import few_copies, parts_per_million, target_load
from hecate.planning.limits import CopyLimits
from hecate.planning.materialize import robust_copies, sparse_materialization
from hecate.planning.quota import even_quota, holder_loads, min_max_loads
from hecate.planning.reshard import few_moves, heterogeneous_sharding
from hecate.policies import LayerSetting, get_policy

Int64 = NDArray[np.int64]
Loads = Callable[..., Int64]
KINDS: dict[str, dict[str, Any]] = {
    "zipf 0.6": {"kind": "zipf", "s": 0.6},
    "zipf 1.2": {"kind": "zipf", "s": 1.2},
    "hot": {"kind": "hot"},
    "drift": {"kind": "drift"},
}
SEEDS, WINDOW, NODE = 3, 5, 8
NOISY = {"drift_rate": 0.1, "step_noise": 0.15, "steps": 16}
DIAL = 1.01


def main() -> None:
    """Run everything, print the tables, write JSON and a plot beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, help="file to write; the plot goes beside it")
    parser.add_argument("--loads", help="a load generator with a function `loads` to use instead of the package's")
    parser.add_argument("--trace", nargs="*", default=[], help="recorded traces (.npz) for the predictors")
    arguments = parser.parse_args()
    loads = load_generator(arguments.loads)
    report = Report()
    known_loads(report, loads)
    plan_times(report, loads)
    ahead(report, loads)
    ahead_across_nodes(report, loads)
    policies(report, loads)
    resharding(report, loads)
    predictors(report, "drift, strong noise, D=8 E=64", noisy_loads(loads, 8, 64, 0))
    for path in arguments.trace:
        for index, layer in enumerate(read_trace(path).layers):
            predictors(report, f"{Path(path).stem}, layer {index}", layer)
            policy_rows(report, f"{Path(path).stem}, layer {index}", read_trace(path).topology, [layer])
    for setting, subject, metric, value in PUBLISHED:
        report.add(setting, subject, metric, value)
    print_tables(report)
    report.write(arguments.json)
    plot(report, Path(arguments.json).with_suffix(".png"))


def load_generator(path: str | None) -> Loads:
    """The function `loads(kind, devices, experts, tokens, top_k, seed, s=, steps=, ...)` of a file, or our own."""
    if path is not None:
        spec = importlib.util.spec_from_file_location("given_loads", path)
        if spec is None or spec.loader is None or not Path(path).exists():
            raise ValueError(f"--loads {path}: must be a Python file with a function `loads`")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.loads

    def own(kind: Any, devices: int, experts: int, tokens: int, top_k: int, seed: int, **settings: Any) -> Int64:
        exponent = settings.pop("s", None) or (0.9 if kind == "drift" else 1.0)
        many = synthetic_loads(kind, devices, experts, tokens // 4, top_k, seed, exponent=exponent, **settings)
        return many if kind == "drift" else many[0]

    return own


def counts_of(loads: Loads, name: str, devices: int, experts: int, seed: int) -> Int64:
    """Counts `[devices, experts]` of one of `KINDS`; the last step if the kind has several."""
    settings = dict(KINDS[name])
    counts = loads(settings.pop("kind"), devices, experts, 4096, top_k(experts), seed, **settings)
    return counts[-1] if counts.ndim == 3 else counts


def noisy_loads(loads: Loads, devices: int, experts: int, seed: int) -> Int64:
    """Counts `[steps, devices, experts]` that drift slowly and sometimes jump."""
    return loads("drift", devices, experts, 4096, top_k(experts), seed, **NOISY)


def top_k(experts: int) -> int:
    """Experts per token, by the rule that the figures of ANCHORS use."""
    return 8 if experts >= 256 else 4


def nodes(devices: int) -> Topology:
    """Topology with 8 devices per node."""
    return Topology(devices, min(NODE, devices))


def plain_imbalance(counts: Int64, owners: Int64) -> float:
    """Max/mean device load under expert parallelism."""
    return imbalance(counts, Placement.from_owners(owners, len(counts)))


def imbalance(counts: Int64, placement: Placement) -> float:
    """Max/mean device load under the exact quota."""
    loads = counts.sum(axis=0)
    return float(min_max_loads(loads[None], placement)[0] * len(counts) / loads.sum())


def even_imbalance(counts: Int64, placement: Placement, topology: Topology) -> float:
    """Max/mean device load under the paper's dispatch."""
    received = even_quota(counts, placement, topology).sum(axis=0)
    device_loads = np.bincount(np.nonzero(placement.matrix)[1], received)
    return float(device_loads.max() * len(counts) / counts.sum())


def known_loads(report: Report, loads: Loads) -> None:
    """Copies and crossings for known loads, as in the table of ANCHORS."""
    cases = [(64, 256, name, slots, "copies") for name in KINDS for slots in (2, 1)]
    cases += [(256, 256, "zipf 1.2", 2, "copies")]
    cases += [(devices, 256, "zipf 1.2", 4, "crossings") for devices in (64, 256)]
    for devices, experts, name, slots, prefer in cases:
        topology, owners = nodes(devices), initial_owners(experts, devices)
        setting, subject = f"D={devices} E={experts} {name}", f"Hecate R={slots}, fewest {prefer}"
        figures = []
        for seed in range(SEEDS):
            counts = counts_of(loads, name, devices, experts, seed)
            plan = hecate.plan(
                counts,
                owners,
                topology,
                memory_slots=slots,
                max_imbalance=DIAL,
                prefer=prefer,  # type: ignore[arg-type]
            )
            figures.append((plan.imbalance, plan.copies, plan.crossings, plan.lower_bound))
            report.add(setting, f"plain EP, seed {seed}", "imbalance", plain_imbalance(counts, owners))
        for metric, value in zip(("imbalance", "copies", "crossings", "lower bound"), np.mean(figures, 0), strict=True):
            report.add(setting, subject, metric, value)


def plan_times(report: Report, loads: Loads) -> None:
    """Milliseconds for one layer's plan: without and with the quota per source device."""
    for devices, repeats in ((64, 200), (256, 50), (1024, 10)):
        topology, owners = nodes(devices), initial_owners(256, devices)
        start, limits = Placement.from_owners(owners, devices), CopyLimits.of(topology, 2)
        for name in KINDS if devices == 64 else ("zipf 1.2",):
            counts = counts_of(loads, name, devices, 256, 0)
            total = counts.sum(axis=0)
            target = target_load(int(total.sum()), devices, parts_per_million(DIAL))

            copies = partial(few_copies, total, start, topology, limits, target=target)
            whole = partial(hecate.plan, counts, owners, topology, memory_slots=2, max_imbalance=DIAL)
            setting = f"D={devices} E=256 {name}"
            report.add(
                setting,
                "Hecate R=2",
                "copies and holder loads",
                milliseconds(partial(_holder_loads, total, copies), repeats),
                "ms",
            )
            report.add(setting, "Hecate R=2", "whole plan", milliseconds(whole, repeats), "ms")


def _holder_loads(total: Int64, copies: Callable[[], Placement]) -> Int64:
    return holder_loads(total, copies())


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Time of a call: the smallest of five medians, each of one batch of calls, since the machine is shared."""
    medians = []
    for _ in range(5):
        times = []
        for _ in range(max(3, repeats // 5)):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        medians.append(np.median(times))
    return float(min(medians)) * 1e3


def windows(history: Int64, every: int = 1) -> Iterator[tuple[Int64, Int64]]:
    """Pairs (steps before, step) for each step that has a whole window before it."""
    for step in range(WINDOW, len(history), every):
        yield history[step - WINDOW : step], history[step]


def ahead(report: Report, loads: Loads) -> None:
    """Imbalance that is left with copies planned from the 5 steps before, without node limits."""
    for devices, experts in ((8, 64), (32, 64), (64, 256)):
        topology, owners = nodes(devices), initial_owners(experts, devices)
        left: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            for past, counts in windows(noisy_loads(loads, devices, experts, seed)):
                for subject, value in ahead_methods(past, counts, owners, topology):
                    left.setdefault(subject, []).append(value)
        add_left(report, f"ahead D={devices} E={experts}", left)


def ahead_methods(past: Int64, counts: Int64, owners: Int64, topology: Topology) -> Iterator[tuple[str, float]]:
    """(method, remaining imbalance) for every way to plan from `past`."""
    mean = predict(past)
    start = Placement.from_owners(owners, topology.num_devices)
    yield "plain EP", plain_imbalance(counts, owners)
    hottest = sparse_materialization(mean, owners, topology, overlap_degree=4, memory_slots=4)
    yield "paper, t=4, evenly", even_imbalance(counts, hottest, topology)
    yield "paper, t=4, exact quota", imbalance(counts, hottest)
    target = target_load(int(mean.sum()), topology.num_devices, parts_per_million(DIAL))
    few = few_copies(mean, start, topology, CopyLimits.of(topology, 2), target=target)
    yield "fewest copies, exact quota", imbalance(counts, few)
    robust = robust_copies(past, owners, topology, CopyLimits.of(topology, 2))
    yield "Hecate R=2", imbalance(counts, robust)
    yield "Hecate R=2, evenly", even_imbalance(counts, robust, topology)
    yield "Hecate R=1", imbalance(counts, robust_copies(past, owners, topology, CopyLimits.of(topology, 1)))


def ahead_across_nodes(report: Report, loads: Loads) -> None:
    """The same for nodes of 8 devices that only a few experts of other nodes may enter."""
    for devices, experts in ((32, 64), (64, 256)):
        topology, owners = nodes(devices), initial_owners(experts, devices)
        for foreign in (0, 1, 2):
            left: dict[str, list[float]] = {}
            for seed in range(SEEDS):
                for past, counts in windows(noisy_loads(loads, devices, experts, seed), every=2):
                    for slots in (2, 3):
                        copies = robust_copies(past, owners, topology, CopyLimits.of(topology, slots, foreign))
                        left.setdefault(f"Hecate R={slots}", []).append(imbalance(counts, copies))
            add_left(report, f"ahead D={devices} E={experts}, {foreign} foreign a node", left)


def add_left(report: Report, setting: str, left: dict[str, list[float]]) -> None:
    """Mean and worst of each subject, and the number of samples."""
    for subject, values in left.items():
        report.add(setting, subject, "imbalance left, mean", float(np.mean(values)))
        report.add(setting, subject, "imbalance left, worst", max(values))
        report.add(setting, subject, "samples", len(values))


def policies(report: Report, loads: Loads) -> None:
    """Every policy on every kind of load."""
    devices, experts = 32, 64
    for name, settings in KINDS.items():
        left = {k: v for k, v in settings.items() if k != "kind"}
        histories = []
        for seed in range(SEEDS):
            drawn = loads(settings["kind"], devices, experts, 4096, top_k(experts), seed, **left)
            histories.append(drawn if drawn.ndim == 3 else np.stack([drawn] * (WINDOW + 1)))
        policy_rows(report, f"policies D={devices} E={experts} {name}", nodes(devices), histories)


def policy_rows(report: Report, setting: str, topology: Topology, histories: list[Int64]) -> None:
    """Every policy as the engine calls it, planning ahead and calibrating, for experts of the size of GPT-MoE-S."""
    weights, width = 4 * 768**2, 768
    cost = LayerCost(CostModel(), 2 * weights, 2 * weights, 6 * weights, 2 * width, 8 * width**2)
    layer = LayerSetting(topology, cost, 2, 1.02, "auto", "pays", 4096)
    for name in ("ep", "hecate", "balanced"):
        policy, figures = get_policy(name), []
        for history in histories:
            owners = initial_owners(history.shape[2], topology.num_devices)
            for past, counts in windows(history, every=max(1, len(history) // 20)):
                placement = policy.calibrate(layer, counts, owners, policy.materialize(layer, past, owners))
                plan = policy.assign(layer, counts, owners, placement)
                figures.append((plan.imbalance, plan.copies, plan.crossings))
        for metric, value in zip(("imbalance", "copies", "crossings"), np.mean(figures, axis=0), strict=True):
            report.add(setting, f"policy {name}", metric, value)


def resharding(report: Report, loads: Loads) -> None:
    """For 12 layers: experts moved, and the largest device load without the t hottest experts."""
    topology, degrees = nodes(32), [4] * 12
    layers = [counts_of(loads, "zipf 1.2", 32, 64, seed).sum(axis=0) for seed in range(12)]
    start = [initial_owners(64, 32, layer * 64) for layer in range(12)]
    results = {
        "before": start,
        "Algorithm 2": heterogeneous_sharding(layers, topology, degrees),
        "fewer moves": few_moves(layers, start, topology, degrees),
    }
    for subject, owners in results.items():
        moved = sum(int((a != b).sum()) for a, b in zip(start, owners, strict=True))
        left = []
        for load, owner in zip(layers, owners, strict=True):
            cold = load.copy()
            cold[np.argsort(-load, kind="stable")[:4]] = 0
            left.append(np.bincount(owner, cold, minlength=32).max() * 32 / cold.sum())
        report.add("re-shard 12 layers D=32 E=64, t=4", subject, "moved experts", moved)
        report.add("re-shard 12 layers D=32 E=64, t=4", subject, "cold imbalance", float(np.mean(left)))


def predictors(report: Report, setting: str, history: Int64) -> None:
    """The error of each predictor on the next loads, and the imbalance that remains with its copies."""
    devices, experts = history.shape[1:]
    topology, owners = Topology(devices, devices), initial_owners(experts, devices)
    every = max(1, len(history) // 100)
    for predictor in get_args(Predictor):
        error, left, before = [], [], []
        for past, counts in windows(history, every):
            loads = counts.sum(axis=0)
            if not loads.sum():
                continue
            guess = predict(past, predictor)
            error.append(np.abs(guess - loads).sum() / loads.sum())
            copies = robust_copies(past, owners, topology, CopyLimits.of(topology, 1), predictor=predictor)
            left.append(imbalance(counts, copies))
            before.append(plain_imbalance(counts, owners))
        report.add(setting, predictor, "prediction error", float(np.mean(error)))
        report.add(setting, predictor, "imbalance left, mean", float(np.mean(left)))
        report.add(setting, predictor, "imbalance left, worst", max(left))
        report.add(setting, predictor, "imbalance before", float(np.mean(before)))


def measured(report: Report, claim: Claim) -> float:
    """The measured figure that a claim refers to."""
    found = [
        row.value
        for row in report.rows
        if (row.setting, row.subject, row.metric) == (claim.setting, claim.subject, claim.metric)
    ]
    if not found:
        raise ValueError(f"no figure for {claim}")
    return max(found)


def print_tables(report: Report) -> None:
    """Print the tables, then the claims beside the measured figures; claims are added to the report as rows."""
    for metric in dict.fromkeys(row.metric for row in report.rows):
        print(report.table(metric), end="\n\n")
    for claim in CLAIMS:
        value = measured(report, claim)
        verdict = "ok" if value <= claim.limit else "MISSED"
        print(f"{verdict:6s} {claim.setting}, {claim.subject}: {claim.metric} {value:.4g}, to show <= {claim.limit:g}")
        report.add(claim.setting, "to show", f"{claim.metric} ({claim.subject})", claim.limit, claim.unit)


def plot(report: Report, path: Path) -> None:
    """Bar plot of the remaining imbalance, mean and worst, for each way to plan ahead."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = [s for s in dict.fromkeys(row.setting for row in report.rows) if s.startswith("ahead") and "," not in s]
    figure, axes = pyplot.subplots(1, len(settings), figsize=(5 * len(settings), 4), layout="constrained")
    for axis, setting in zip(axes, settings, strict=True):
        rows = [r for r in report.rows if r.setting == setting and r.subject != "to show"]
        mean = {r.subject: r.value for r in rows if r.metric == "imbalance left, mean"}
        worst = [r.value for r in rows if r.metric == "imbalance left, worst" and r.subject in mean]
        subjects = [r.subject for r in rows if r.metric == "imbalance left, worst"]
        axis.barh(subjects, worst, color="#c8d6e5", label="worst")
        axis.barh(list(mean), list(mean.values()), height=0.4, color="#2e5d8a", label="mean")
        axis.set_xlim(left=0.9)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set(title=setting, xlabel="max / mean device load")
    axes[0].legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
