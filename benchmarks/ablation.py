"""What each part of FSSDP gives: the paper's ablations (section 5), each with the paper's figure beside ours.

    python -m benchmarks.ablation --json FILE [--parts NAME,NAME] [key=value ...]
    python -m benchmarks.ablation --cluster --json FILE             # on 2 emulated nodes of 4 devices

- materialization: copies and re-sharding, and either alone.
- interval: re-sharding every 10 to 100 steps, in at least 100 rounds.
- slots: copies that a device may hold per layer.
- rematerialize: copies released after forward and gathered again for backward.
- layer: the forward pass of the MoE layers, and the exchange of tokens in it.
- batch: the largest batch within a byte budget, from measured bytes: state of the device plus what autograd saves per
  sequence. Nothing is run until memory is full.

The paper's figures are from 32 GPUs and other sizes; a ratio beside them shows the direction, not the same experiment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.end_to_end import CPU, INTER_MBIT, NODES, ON_CLUSTER, ON_TWO, PER_NODE, on_cluster
from benchmarks.report import Report
from benchmarks.side_by_side import Found, Options, add_options, close, measure, options_of, report_on, resolved, start
from benchmarks.systems import System
from benchmarks.systems.base import MEMORY
from benchmarks.timeline import Timeline
from hecate.train.distributed import World, launch
from hecate.values.local import local_tensor

SKEW = "zipf:1.2"
FORWARD = ("count", "plan", "gather", "dispatch", "experts", "combine")
ALONE = "hecate:memory_slots=0:reshard_interval=20"
COPIES = "hecate:calibrate=always:reshard_interval=0"
BOTH = "hecate:calibrate=always:reshard_interval=20"
KEPT = "balanced:calibrate=always"
AGAIN = "balanced:calibrate=always:rematerialize=true"


@dataclass(frozen=True)
class Part:
    """One ablation.

    Attributes:
        systems: what is compared.
        ratios: (metric, system above, system below, the paper's figure or None); see `_value`.
        rounds: least number of rounds.
    """

    systems: tuple[str, ...]
    ratios: tuple[tuple[str, str, str, float | None], ...] = ()
    rounds: int = 1


PARTS: Mapping[str, Part] = {
    "materialization": Part(
        ("ep", ALONE, COPIES, BOTH),
        (("tokens_per_second", BOTH, ALONE, 3.32), ("tokens_per_second", BOTH, COPIES, 1.27)),
    ),
    "interval": Part(("ep", *(f"balanced:reshard_interval={n}" for n in (10, 25, 50, 100))), rounds=100),
    "slots": Part(("ep", *(f"{KEPT}:memory_slots={n}" for n in (0, 1, 2, 4)))),
    "rematerialize": Part(
        ("ep", KEPT, AGAIN),
        (("exposed_copies", AGAIN, KEPT, 3.6), ("seconds", AGAIN, KEPT, 1.12), ("memory_copies", AGAIN, KEPT, 0.098)),
    ),
    "layer": Part(("ep", "balanced"), (("layer", "ep", "balanced", 11.87), ("all_to_all", "ep", "balanced", 12.3))),
    "batch": Part(("ep", KEPT, AGAIN)),
}
"""The paper: RM is 7.5-16.9 % slower end to end (here the middle) and needs 90.2 % less memory for copies."""


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=20, warm_up=22)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between (default: %(default)s)")
    parser.add_argument("--skew", default=SKEW)
    parser.add_argument("--budget", type=int, default=2**30, metavar="BYTES", help="of part batch (default: 1 GiB)")
    parser.add_argument("--cluster", action="store_true", help=f"on {NODES} emulated nodes of {PER_NODE} devices")
    given = parser.parse_intermixed_args()
    parts = given.parts.split(",")
    try:
        if unknown := set(parts) - set(PARTS):
            raise ValueError(f"--parts {','.join(sorted(unknown))}: must be of {', '.join(PARTS)}")
        options = options_of(given, (), [given.skew])
    except ValueError as error:
        parser.error(str(error))
    if given.cluster:
        return on_cluster("benchmarks.ablation", (NODES, PER_NODE, INTER_MBIT, CPU), ON_CLUSTER)
    config = resolved([*(ON_TWO if given.where is None else ()), *given.overrides])
    launch(config, partial(run, options=options, parts=parts, budget=given.budget, file=given.json))
    return 0


def run(
    config: Mapping[str, Any], world: World, options: Options, parts: Sequence[str], budget: int, file: Path | None
) -> None:
    """One rank's part; rank 0 reports."""
    report, (skew,) = Report(), options.skews
    for name in parts:
        chosen = replace(options, systems=PARTS[name].systems, rounds=max(options.rounds, PARTS[name].rounds))
        systems = start(config, world, chosen)
        setting = f"{name}, {options.where or f'{world.size} processes'}, {skew}"
        found = measure(systems, world, chosen, skew, first=0)
        if name == "batch":
            add_batches(report, systems, world, setting, budget)
        else:
            tokens = next(iter(systems.values())).task.tokens_per_step
            report_on(report, found, setting, tokens)
            add_ratios(report, found, PARTS[name], setting, world)
        close(systems.values())
        if world.rank == 0 and file is not None:
            report.write(file, options.command)  # after every part: what is cut short leaves the parts before
    if world.rank == 0:
        metrics = dict.fromkeys(row.metric for row in report.rows)
        wanted = ("tokens_per_second", "over_ep", "imbalance_after", "largest_batch")
        print(*(report.table(m) for m in metrics if m in wanted or " of " in m), sep="\n\n")


def add_ratios(report: Report, found: Found, part: Part, setting: str, world: World) -> None:
    """Our ratios, and the paper's. Collective."""
    for metric, above, below, paper in part.ratios:
        values = [_value(found, metric, name, world) for name in (above, below)]
        title = f"{metric} of {above} over {below}"
        if all(values):
            report.add(setting, "here", title, values[0] / values[1])
        if paper is not None:
            report.add(setting, "paper", title, paper)


def _value(found: Found, metric: str, system: str, world: World) -> float:
    """Tokens per second (up to a factor), seconds of a step, bytes of copies, or seconds of a kind in the profile."""
    seconds = sum(found.seconds[system]) / len(found.seconds[system])
    timeline = found.timelines[system]
    values: Mapping[str, Callable[[], float]] = {
        "tokens_per_second": lambda: 1 / seconds,
        "seconds": lambda: seconds,
        "memory_copies": lambda: max(found.memory[system]["copies"]),
        "exposed_copies": lambda: timeline.seconds["copies"],
        "all_to_all": lambda: timeline.seconds["all_to_all"],
        "layer": lambda: float(world.gather([_forward_seconds(timeline)]).mean()),
    }
    return values[metric]()


def _forward_seconds(timeline: Timeline) -> float:
    return sum(span.end - span.begin for span in timeline.spans if span.verb in FORWARD and span.of != "wait")


def add_batches(report: Report, systems: Mapping[str, System], world: World, setting: str, budget: int) -> None:
    """The largest batch of each system, in sequences per device, that needs at most `budget` bytes on each."""
    for name, system in systems.items():
        by_kind = system.bytes_by_kind()
        state = sum(by_kind[kind] for kind in MEMORY)
        saved = saved_bytes(system, number=1000) / system.task.settings.batch_size
        state, saved = world.gather([float(state), saved]).max(dim=0).values.tolist()
        report.add(setting, name, "state_bytes", state, "B")
        report.add(setting, name, "saved_bytes_per_sequence", saved, "B")
        report.add(f"{setting}, {budget} bytes", name, "largest_batch", max(0, (budget - state) // saved))


def saved_bytes(system: System, number: int) -> int:
    """Bytes that autograd saves for backward in step `number`, weights left out. Collective."""
    weights = {local_tensor(p).untyped_storage().data_ptr() for p in system.model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        system.step(number)
    return sum(found.values())


if __name__ == "__main__":
    sys.exit(main())
