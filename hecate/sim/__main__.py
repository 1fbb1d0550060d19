"""`python -m hecate.sim [model=...] [cluster=...] [policy=...] [trace=...] [key=value ...]`: what a step takes."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from hecate.checkpoint.folder import replace_file
from hecate.sim.conf import names_of, read_task
from hecate.sim.files import check_writable
from hecate.sim.run import Result, ceiling, simulate, with_tokens
from hecate.sim.step import Timing

__all__ = ["main"]

WORDS = {
    "dense_ns": "non-MoE compute",
    "expert_ns": "expert compute",
    "tokens_ns": "exchange of tokens",
    "counts_ns": "exchange of counts, planning",
    "packing_ns": "permutations",
    "exposed_copies_ns": "exposed: copies",
    "exposed_gradients_ns": "exposed: copies' gradients",
    "exposed_dense_ns": "exposed: FSDP2's traffic",
    "optimizer_ns": "optimizer, re-sharding",
}


def main() -> None:
    """Read the command line, simulate, print; errors end with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m hecate.sim",
        description="Simulates training steps of a model on a cluster.",
        epilog=f"keys and defaults: conf/sim/config.yaml. models: {', '.join(names_of('model'))}. "
        f"clusters: {', '.join(names_of('cluster'))}.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    try:
        check_writable("--json", arguments.json)
        task = read_task(arguments.settings)
        settings = with_tokens(task.settings, task.loads, task.model, task.cluster)
        result = simulate(task.model, task.cluster, settings, task.loads, task.steps, patterns=task.patterns)
        best = ceiling(task.model, task.cluster, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(result, best))
    if arguments.json is not None:
        replace_file(arguments.json, json.dumps(as_json(result, best), indent=1) + "\n")


def table(result: Result, best: Result) -> str:
    """The result in words."""
    settings, cluster, gib = result.settings, result.cluster, 2**30
    lines = [
        f"{result.model.name} on {cluster.devices} devices of {cluster.name}, policy {settings.policy}, "
        f"{settings.tokens} tokens a device",
        f"step                          {result.step_ns / 1e6:10.2f} ms   "
        f"{best.step_ns / result.step_ns:6.1%} of the ceiling",
        *(f"  {words:28}{result.mean_ns(name) / 1e6:10.2f} ms" for name, words in WORDS.items()),
        f"imbalance without, with copies {result.imbalance_before:8.3f}, {result.imbalance_after:.3f}",
        f"copies, node crossings a layer {result.copies:8.1f}, {result.crossings:.1f}",
        f"memory of a device            {result.memory.total / gib:10.2f} GiB of {cluster.device_memory / gib:.1f}"
        + ("" if result.memory.total <= cluster.device_memory else ": DOES NOT FIT"),
        *(f"  {kind:28}{size / gib:10.2f} GiB" for kind, size in asdict(result.memory).items()),
        f"planned here in {result.planning_seconds:.2f} s",
    ]
    return "\n".join(lines)


def as_json(result: Result, best: Result) -> dict[str, object]:
    """All figures; times in nanoseconds, memory in bytes."""
    return {
        "model": asdict(result.model),
        "cluster": asdict(result.cluster),
        "settings": asdict(result.settings),
        "step_ns": result.step_ns,
        "ceiling_step_ns": best.step_ns,
        "times_ns": {name: result.mean_ns(name) for name in Timing.__dataclass_fields__},
        "steps_ns": [step.step_ns for step in result.steps],
        "imbalance_before": result.imbalance_before,
        "imbalance_after": result.imbalance_after,
        "copies": result.copies,
        "crossings": result.crossings,
        "memory_bytes": asdict(result.memory),
    }


if __name__ == "__main__":
    main()
