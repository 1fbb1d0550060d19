"""Simulates steps of training and sums up what they took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from hecate.loads.scenario import Scenario
from hecate.loads.trace import Trace
from hecate.policies import get_policy
from hecate.sim.cluster import Cluster
from hecate.sim.memory import Memory, memory_of
from hecate.sim.model import ModelShape
from hecate.sim.plans import Layers, PlannedLayer
from hecate.sim.settings import FSDP, Settings
from hecate.sim.step import Timing, time_step

__all__ = ["Result", "ceiling", "simulate", "with_tokens"]

Int64 = NDArray[np.int64]
PATTERNS = 4
"""Distinct layers of generated loads; a model's further layers repeat them, so that large clusters stay affordable."""


@dataclass(frozen=True)
class Result:
    """What was simulated and what it takes.

    Attributes:
        model, cluster, settings: as passed.
        steps: one timing per step that was counted.
        imbalance_before, imbalance_after: max/mean device load of all layers and steps, without and with copies.
        copies: mean copies per layer.
        crossings: mean pairs of an expert and a foreign node that holds a copy, per layer.
        memory: of the fullest device.
        planning_seconds: host time that planning and routes took here; measured, so not deterministic.
    """

    model: ModelShape
    cluster: Cluster
    settings: Settings
    steps: tuple[Timing, ...]
    imbalance_before: float
    imbalance_after: float
    copies: float
    crossings: float
    memory: Memory
    planning_seconds: float

    @property
    def step_ns(self) -> int:
        """Mean time of a step."""
        return sum(step.step_ns for step in self.steps) // len(self.steps)

    def mean_ns(self, name: str) -> int:
        """Mean over the steps of one of `Timing`'s attributes."""
        return sum(getattr(step, name) for step in self.steps) // len(self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices of all replicas together."""
        return self.settings.tokens * self.cluster.devices * self.settings.replicas * 1e9 / self.step_ns


def simulate(
    model: ModelShape,
    cluster: Cluster,
    settings: Settings,
    loads: Scenario | Trace,
    steps: int = 10,
    warm_up: int | None = None,
    patterns: int = PATTERNS,
) -> Result:
    """Simulate `steps` steps of training, after `warm_up` more in which the load history fills.

    Args:
        model: what is trained.
        cluster: where.
        settings: how.
        loads: generated, or recorded by the trainer (`trace=true`). A trace of other devices or tokens than those of
            `cluster` and `settings` gives its popularity of experts alone; see `with_tokens`.
        steps: steps that count.
        warm_up: None takes `settings.load_window`.
        patterns: distinct layers of generated loads.

    Raises:
        ValueError: an unknown policy, or a trace that does not fit the model.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: must be an integer >= 1")
    before = settings.load_window if warm_up is None else warm_up
    policy = get_policy("ep" if settings.policy == FSDP else settings.policy)
    layers = Layers(model, cluster, settings, policy, _loads(model, cluster, settings, loads, patterns))
    timings, planned = [], []
    for _ in range(before):
        layers.skip()
    for _ in range(steps):
        found, moved = layers.step()
        timings.append(time_step(model, cluster, settings, found, moved))
        planned += found[: len(set(map(id, found)))]
    return _result(model, cluster, settings, timings, planned, layers.planning_ns)


def with_tokens(settings: Settings, loads: Scenario | Trace, model: ModelShape, cluster: Cluster) -> Settings:
    """The settings with a trace's tokens per device and step if it was recorded on as many devices, else unchanged.

    Call it once, with the whole cluster: ways of training that are compared, on parts of the cluster too, must all have
    equally many tokens.
    """
    if isinstance(loads, Scenario) or loads.topology.num_devices != cluster.devices or not len(loads.steps):
        return settings
    rows = max(int(step.sum()) for step in loads.layers[0]) // cluster.devices
    return replace(settings, tokens=max(1, rows // model.top_k))


def ceiling(model: ModelShape, cluster: Cluster, settings: Settings) -> Result:
    """The force-balanced ceiling: every device computes equally many tokens without any copy.

    If experts cannot be divided evenly among the devices, tokens go to as many more experts as that takes.
    """
    even = replace(settings, policy="ep", memory_slots=0)
    divisible = -(-model.num_experts // cluster.devices) * cluster.devices
    wide = replace(model, num_experts=divisible)
    loads = Scenario(kind="even").steps(0, cluster.devices, divisible, settings.tokens, model.top_k)
    layers = Layers(wide, cluster, even, get_policy("ep"), [loads])
    planned, _ = layers.step()
    return _result(model, cluster, even, [time_step(model, cluster, even, planned, None)], planned[:1], 0)


def _result(
    model: ModelShape,
    cluster: Cluster,
    settings: Settings,
    timings: Sequence[Timing],
    planned: Sequence[PlannedLayer],
    planning_ns: int,
) -> Result:
    alone = settings.policy == FSDP  # every device computes its own tokens
    after = [1.0 if alone else layer.plan.imbalance for layer in planned]
    totals = [int(layer.plan.device_loads.sum()) for layer in planned]
    loads = zip(planned, totals, strict=True)
    start = [layer.before * cluster.devices / total if total else 1.0 for layer, total in loads]
    owned = max(int(np.bincount(layer.plan.owners).max()) for layer in planned)
    copies = max(int(layer.copies.max()) for layer in planned)
    return Result(
        model=model,
        cluster=cluster,
        settings=settings,
        steps=tuple(timings),
        imbalance_before=mean(start),
        imbalance_after=mean(after),
        copies=0.0 if alone else mean(layer.plan.copies for layer in planned),
        crossings=0.0 if alone else mean(layer.plan.crossings for layer in planned),
        memory=memory_of(model, cluster, settings, copies, max(after), owned),
        planning_seconds=planning_ns / 1e9,
    )


def _loads(
    model: ModelShape, cluster: Cluster, settings: Settings, loads: Scenario | Trace, patterns: int
) -> list[Iterator[Int64]]:
    if isinstance(loads, Trace):
        return _trace_loads(loads, model, cluster, settings)
    number = min(patterns, model.num_layers)
    shape = (cluster.devices, model.num_experts, settings.tokens, model.top_k)
    return [loads.steps(layer, *shape) for layer in range(number)]


def _trace_loads(trace: Trace, model: ModelShape, cluster: Cluster, settings: Settings) -> list[Iterator[Int64]]:
    """The counts of a trace, int64 `[D, E]` per layer and step, from the beginning again when it ends.

    If it was recorded on another number of devices, or with other tokens than the settings have, every device gets its
    tokens, and an equal share of each expert's load.

    Raises:
        ValueError: it has no steps, or other layers or experts than the model.
    """
    found = (len(trace.layers), {layer.shape[2] for layer in trace.layers})
    wanted = (model.num_layers, {model.num_experts})
    if found != wanted or not len(trace.steps):
        raise ValueError(
            f"trace: {len(trace.steps)} steps of {found[0]} layers of {sorted(found[1])} experts, must have steps, and "
            f"as model {model.name} {model.num_layers} layers of {model.num_experts} experts"
        )
    devices, rows = cluster.devices, settings.tokens * model.top_k
    same = trace.topology.num_devices == devices and with_tokens(settings, trace, model, cluster) == settings

    def forever(layer: Int64) -> Iterator[Int64]:
        while True:
            for counts in layer:
                if not counts.any():
                    continue
                yield np.ascontiguousarray(counts) if same else _spread(counts, devices, rows)

    return [forever(layer) for layer in trace.layers]


def _spread(counts: Int64, devices: int, rows: int) -> Int64:
    """Int64 `[devices, E]` with `rows` per device and the popularity of experts of `counts`."""
    loads = counts.sum(axis=0)
    ends = np.concatenate([[0], np.cumsum(loads)])
    # Device d's shares begin where those of the one before it end, so that what is rounded adds up.
    places = (ends[None] * devices + np.arange(devices)[:, None]) * rows // (int(ends[-1]) * devices)
    places[:, -1], places[:, 0] = rows, 0
    return np.diff(places, axis=1)
