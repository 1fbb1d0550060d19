"""Systems side by side in the same processes: they take steps in turn, so that other load slows all of them alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import mean, median, quantiles
from typing import Any

import hydra
from omegaconf import OmegaConf

from benchmarks.report import Report
from benchmarks.skews import Even, parse_skew
from benchmarks.steady import steady
from benchmarks.systems import CEILING, MissingError, System, Task, make_system
from benchmarks.systems.base import MEMORY, ModelKind
from benchmarks.timeline import Timeline, profiled
from hecate.train.distributed import World
from hecate.train.settings import Settings, conf_dir

__all__ = ["Found", "Options", "add_options", "close", "measure", "options_of", "report_on", "resolved", "start"]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        systems: names, as `make_system` takes them.
        skews: names, as `parse_skew` takes them; measured one after the other.
        rounds: measured rounds of each skew.
        warm_up: rounds before them, while caches and the load history fill.
        kind: which model.
        where: the machine in words, first part of every setting; None: the number of processes.
        command: what the user typed, where a benchmark started itself on a cluster; None: what started this process.
    """

    systems: tuple[str, ...]
    skews: tuple[str, ...]
    rounds: int
    warm_up: int
    kind: ModelKind = "gpt"
    where: str | None = None
    command: str | None = None


@dataclass
class Found:
    """What was measured under one skew.

    Attributes:
        seconds: per system, the slowest rank's seconds of every round.
        figures: per system, the means over the rounds of its own figures, of the loss, and of the CPU time of a step on
            the busiest rank and on the mean one.
        memory: per system and kind of `MEMORY`, bytes of every device; those of Hecate are peaks since its start, so a
            later skew includes the copies of earlier ones.
        timelines: per system, one more step under torch's profiler; those with labels of Hecate only.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    timelines: dict[str, Timeline] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser, rounds: int, warm_up: int) -> None:
    """The options that benchmarks of whole steps share."""
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds per skew (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=warm_up, help="rounds before them (default: %(default)s)")
    parser.add_argument("--model", choices=("gpt", "mixtral"), default="gpt")
    for name in ("--where", "--command"):  # set where a benchmark starts itself on a cluster
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of conf/config.yaml")


def options_of(given: argparse.Namespace, systems: Sequence[str], skews: Sequence[str]) -> Options:
    """`Options` from parsed arguments; ValueError for a number or skew that cannot be."""
    if given.rounds < 1 or given.warm_up < 0:
        raise ValueError(f"--rounds {given.rounds} --warm-up {given.warm_up}: must be at least 1 and 0")
    for skew in skews:
        parse_skew(skew)
    return Options(tuple(systems), tuple(skews), given.rounds, given.warm_up, given.model, given.where, given.command)


def resolved(overrides: Sequence[str]) -> dict[str, Any]:
    """conf/config.yaml with `overrides`, as plain values."""
    with hydra.initialize_config_dir(version_base=None, config_dir=str(conf_dir())):
        config = OmegaConf.to_container(hydra.compose("config", overrides=list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return {str(name): value for name, value in config.items()}


def start(config: Mapping[str, Any], world: World, options: Options) -> dict[str, System]:
    """All systems that can run here; rank 0 names the others and why. Collective."""
    steady()
    task = Task(Settings.from_config(config), world, options.kind)
    systems = {}
    for name in options.systems:
        try:
            systems[name] = make_system(name, task)
        except MissingError as missing:
            if world.rank == 0:
                print(f"skipped: {name}: {missing}", file=sys.stderr, flush=True)
    return systems


def close(systems: Iterable[System]) -> None:
    """End what systems keep. Collective."""
    for system in systems:
        system.close()


def measure(systems: Mapping[str, System], world: World, options: Options, skew: str, first: int) -> Found:
    """Warm up, then measure `options.rounds` rounds, then one step of each under the profiler. Collective.

    Args:
        systems: by name; the one called `CEILING` keeps an even router.
        world: this process.
        options: how many rounds.
        skew: its name.
        first: number of the first round: of its batches and choices.
    """
    for name, system in systems.items():
        system.router.skew = Even() if name == CEILING else parse_skew(skew)
    names, found = list(systems), Found(seconds={name: [] for name in systems})
    figures: dict[str, list[Mapping[str, float]]] = {name: [] for name in systems}
    for number in range(first, first + options.warm_up + options.rounds):
        for name in Random(number).sample(names, len(names)):  # no system always follows the same one
            system = systems[name]
            of_ranks = world.gather([system.step(number), system.loss, system.cpu_seconds])
            if number >= first + options.warm_up:
                found.seconds[name].append(float(of_ranks[:, 0].max()))
                loss, cpu = float(of_ranks[:, 1].mean()), of_ranks[:, 2]
                ran = {"cpu_seconds_max": float(cpu.max()), "cpu_seconds_mean": float(cpu.mean())}
                figures[name].append({"loss": loss, **ran, **system.figures()})
    for name, system in systems.items():
        found.figures[name] = {key: mean(f[key] for f in figures[name]) for key in figures[name][0]}
        by_kind = system.bytes_by_kind()
        table = world.gather([float(by_kind[kind]) for kind in MEMORY])
        found.memory[name] = {kind: table[:, i].tolist() for i, kind in enumerate(MEMORY)}
        found.timelines[name] = profiled(system, world, first + options.warm_up + options.rounds)
    return found


def report_on(report: Report, found: Found, setting: str, tokens_per_step: int) -> None:
    """Add the figures of one skew: medians over the rounds; ratios are taken within each round."""
    for name, own in found.seconds.items():
        report.add(setting, name, "seconds", median(own), "s")
        report.add(setting, name, "seconds_spread", _spread(own) / median(own))
        report.add(setting, name, "tokens_per_second", tokens_per_step / median(own), "1/s")
        for metric, other, scale in (("percent_of_ceiling", CEILING, 100.0), ("over_ep", "ep", 1.0)):
            if other in found.seconds:
                ratios = [scale * a / b for a, b in zip(found.seconds[other], own, strict=True)]
                report.add(setting, name, metric, median(ratios), "%" if metric == "percent_of_ceiling" else "")
                report.add(setting, name, f"{metric}_spread", _spread(ratios))
        for metric, value in found.figures[name].items():
            unit = {"bytes_copied": "B", "exposed_experts": "s"}.get(metric, "s" if "cpu_seconds" in metric else "")
            report.add(setting, name, metric, value, unit)
        for kind, of_devices in found.memory[name].items():
            report.add(setting, name, f"memory_{kind}_max", max(of_devices), "B")
            report.add(setting, name, f"memory_{kind}_mean", mean(of_devices), "B")
        for kind, seconds in found.timelines[name].seconds.items():
            report.add(setting, name, f"exposed_{kind}", seconds, "s")


def _spread(values: Sequence[float]) -> float:
    """Distance of the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low
