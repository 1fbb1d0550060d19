"""Simulates the ways of training a model on a cluster, and says which to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

from hecate.advise.report import Advice, Option
from hecate.loads.scenario import Scenario
from hecate.loads.trace import Trace
from hecate.sim.cluster import Cluster
from hecate.sim.conf import cluster_named, model_named, trace_from
from hecate.sim.model import ModelShape, from_transformers
from hecate.sim.run import Result, ceiling, simulate, with_tokens
from hecate.sim.settings import FSDP, Settings

__all__ = ["advise", "advise_on"]

WARM_UP, PATTERNS = 5, 2
"""Steps before the one that counts, and distinct layers: few, since the answer is to come in seconds."""
CURVE_LAYERS = 4
"""Layers of the models by which gains are compared over imbalances and tokens: a ratio needs no more."""
EXPONENTS = (0.0, 0.15, 0.3, 0.6, 0.9, 1.2)
TOKENS = (512, 2048, 8192, 32768)
PAYS = 1.01
"""Throughput over expert parallelism from which it pays: less is within what the simulator can tell."""
DEFAULT_TOKENS = 8192


def advise(
    model_config: object,
    cluster: Cluster | str | PathLike[str],
    trace: Trace | str | PathLike[str] | None = None,
    *,
    tokens: int = DEFAULT_TOKENS,
    devices: int | None = None,
) -> Advice:
    """What to use for a model on a cluster, what it gives, and from when on it pays. Needs no GPU and no process group.

    Args:
        model_config: a transformers config or the path of one, the name of a file of conf/sim/model, or a `ModelShape`.
        cluster: the name of a file of conf/sim/cluster, the path of a profile that `hecate.sim.measure` wrote, or a
            `Cluster`.
        trace: loads that the trainer has recorded, or the path of such a file; None assumes loads, and says which.
        tokens: tokens of a device in a step; a trace of as many devices brings its own.
        devices: another number of devices than the cluster says.

    Raises:
        ValueError: an unknown model, cluster or trace (the message lists what is known), a trace that does not match
            the model, or a number out of range.
    """
    shape = _shape(model_config)
    place = cluster if isinstance(cluster, Cluster) else cluster_named(str(cluster))
    place = place if devices is None else place.resized(devices)
    loads: Scenario | Trace = Scenario()
    if trace is not None:
        loads = trace if isinstance(trace, Trace) else trace_from(str(trace))
    return advise_on(shape, place, Settings(tokens=tokens), loads)


def advise_on(model: ModelShape, cluster: Cluster, settings: Settings, loads: Scenario | Trace) -> Advice:
    """`advise` for records of the simulator; `settings.policy`, `memory_slots` and `rematerialize` are not used.

    Args:
        model: the model.
        cluster: the cluster.
        settings: how to train.
        loads: generated or recorded.
    """
    settings = with_tokens(settings, loads, model, cluster)
    results = [_simulated(model, cluster, s, loads) for s in _ways(model, cluster, settings)]
    top = ceiling(model, cluster, settings)
    options = tuple(_option(result, top) for result in results)
    best, chosen = _best(options, results)
    ep, fsdp = results[0], results[1]
    by_imbalance, by_tokens, by_tokens_fsdp = _curves(model, cluster, chosen.settings, loads)
    return Advice(
        model=model.name,
        cluster=cluster.name,
        devices=cluster.devices,
        tokens=settings.tokens,
        assumed=_assumed(loads, ep),
        best=best,
        options=options,
        over_ep=ep.step_ns / chosen.step_ns,
        over_fsdp=fsdp.step_ns / chosen.step_ns,
        imbalance=ep.imbalance_before,
        break_even_imbalance=_from_where_on(by_imbalance),
        break_even_tokens=_from_where_on(by_tokens),
        pays_over_fsdp_up_to=_up_to(by_tokens_fsdp),
        over_ep_by_imbalance=by_imbalance,
        over_ep_by_tokens=by_tokens,
        over_fsdp_by_tokens=by_tokens_fsdp,
        memory_by_kind=asdict(chosen.memory),
        device_memory=cluster.device_memory,
        verdict=_verdict(best, options, ep, fsdp, chosen, cluster),
    )


def _shape(model: Any) -> ModelShape:
    if isinstance(model, ModelShape):
        return model
    return model_named(str(model)) if isinstance(model, str | PathLike) else from_transformers(model)


def _ways(model: ModelShape, cluster: Cluster, settings: Settings) -> list[Settings]:
    """Expert parallelism, FSDP2 without it, and Hecate's policy: slots, re-materialization, groups of one node."""
    ways = [replace(settings, policy="ep", memory_slots=0), replace(settings, policy=FSDP, memory_slots=0)]
    if cluster.devices > 1:
        most = min(2, model.num_experts)
        ways += [
            replace(settings, policy="balanced", memory_slots=slots, rematerialize=again)
            for slots in range(1, most + 1)
            for again in (False, True)
        ]
    per_node = cluster.topology.devices_per_node
    if 1 < per_node < cluster.devices:
        ways.append(replace(ways[-2], replicas=cluster.devices // per_node))
    return ways


def _simulated(model: ModelShape, cluster: Cluster, settings: Settings, loads: Scenario | Trace) -> Result:
    group = cluster if settings.replicas == 1 else cluster.resized(cluster.devices // settings.replicas)
    return simulate(model, group, settings, loads, 1, WARM_UP, PATTERNS)


def _option(result: Result, top: Result) -> Option:
    settings = result.settings
    return Option(
        policy=settings.policy,
        memory_slots=settings.memory_slots,
        rematerialize=settings.rematerialize,
        group_size=result.cluster.devices,
        grouped=settings.replicas > 1,
        step_ms=result.step_ns / 1e6,
        of_ceiling=top.step_ns / result.step_ns,
        imbalance=result.imbalance_after,
        exposed_ms=(result.mean_ns("exposed_copies_ns") + result.mean_ns("exposed_gradients_ns")) / 1e6,
        memory_bytes=result.memory.total,
        fits=result.memory.total <= result.cluster.device_memory,
    )


def _best(options: Sequence[Option], results: Sequence[Result]) -> tuple[Option | None, Result]:
    """The fastest that fits; what is within 1 % of it and takes less memory is better. Without any, the smallest."""
    fitting = [i for i, option in enumerate(options) if option.fits]
    if not fitting:
        return None, results[min(range(len(options)), key=lambda i: options[i].memory_bytes)]
    fastest = min(options[i].step_ms for i in fitting)
    near = [i for i in fitting if options[i].step_ms <= fastest * PAYS]
    chosen = min(near, key=lambda i: options[i].memory_bytes)
    return options[chosen], results[chosen]


def _curves(
    model: ModelShape, cluster: Cluster, settings: Settings, loads: Scenario | Trace
) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]]:
    """Throughput over expert parallelism by imbalance and by tokens, and over FSDP2 by tokens; empty for one device.

    If `settings` are without Hecate's copies, those of `balanced` with two slots are compared.
    """
    if cluster.devices == 1:
        return (), (), ()
    ours = replace(settings, policy="balanced", memory_slots=2) if settings.policy in ("ep", FSDP) else settings
    return _by_imbalance(model, cluster, ours, loads), *_by_tokens(model, cluster, ours, loads)


def _by_imbalance(
    model: ModelShape, cluster: Cluster, settings: Settings, loads: Scenario | Trace
) -> tuple[tuple[float, float], ...]:
    """Throughput over expert parallelism for generated loads of growing skew, from none at all."""
    base = loads if isinstance(loads, Scenario) else Scenario()
    skews = [replace(base, kind="even"), *(replace(base, kind="drift", exponent=e, drift_std=e / 2) for e in EXPONENTS)]
    return tuple(sorted(_over_ep(model.cut(CURVE_LAYERS), cluster, settings, skew) for skew in skews))


def _over_ep(model: ModelShape, cluster: Cluster, settings: Settings, loads: Scenario) -> tuple[float, float]:
    """The imbalance without copies, and the throughput over expert parallelism."""
    ep = _simulated(model, cluster, _other(settings, "ep"), loads)
    return ep.imbalance_before, ep.step_ns / _simulated(model, cluster, settings, loads).step_ns


def _by_tokens(
    model: ModelShape, cluster: Cluster, settings: Settings, loads: Scenario | Trace
) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]]:
    """Throughput over expert parallelism, and over FSDP2 without it, for few and many tokens."""
    over_ep, over_fsdp = [], []
    for tokens in TOKENS:
        ours = replace(settings, tokens=tokens)
        ways = (ours, _other(ours, "ep"), _other(ours, FSDP))
        own, ep, fsdp = (_layers_ns(model, cluster, way, loads) for way in ways)
        over_ep.append((tokens, ep / own))
        over_fsdp.append((tokens, fsdp / own))
    return tuple(over_ep), tuple(over_fsdp)


def _other(settings: Settings, policy: str) -> Settings:
    """What Hecate is compared with: all devices in one group, no copies."""
    return replace(settings, policy=policy, memory_slots=0, replicas=1)


def _layers_ns(model: ModelShape, cluster: Cluster, settings: Settings, loads: Scenario | Trace) -> int:
    """Time of some layers in the middle of a model: what is exposed before the first one does not count."""

    def step_ns(layers: int) -> int:
        own = replace(loads, layers=loads.layers[:layers]) if isinstance(loads, Trace) else loads
        return _simulated(model.cut(layers), cluster, settings, own).step_ns

    if model.num_layers <= 2 * CURVE_LAYERS:
        return step_ns(model.num_layers)
    return step_ns(2 * CURVE_LAYERS) - step_ns(CURVE_LAYERS)


def _up_to(points: Sequence[tuple[int, float]]) -> int | None:
    """The last place up to which all points pay; the reverse of `_from_where_on`."""
    found = _from_where_on([(-place, gain) for place, gain in reversed(points)])
    return None if found is None else -int(found)


def _from_where_on(points: Sequence[tuple[Any, float]]) -> Any:
    """The first place from which on all points pay; between two points, on the line that connects them."""
    last: tuple[Any, float] | None = None
    for place, gain in reversed(points):
        if gain < PAYS:
            if last is None:
                return None
            share = (PAYS - gain) / (last[1] - gain)
            found = place + (last[0] - place) * share
            return int(found) if isinstance(place, int) else found
        last = (place, gain)
    return None if last is None else last[0]


def _assumed(loads: Scenario | Trace, ep: Result) -> str:
    if isinstance(loads, Trace):
        return f"loads of the trace: {len(loads.steps)} steps, imbalance {ep.imbalance_before:.2f} without copies"
    return (
        f"assumed loads: {loads.kind}, Zipf exponent {loads.exponent:g}, which is an imbalance of "
        f"{ep.imbalance_before:.2f} without copies; pass trace=FILE for your own"
    )


def _verdict(
    best: Option | None, options: Sequence[Option], ep: Result, fsdp: Result, chosen: Result, cluster: Cluster
) -> str:
    if best is None:
        least = min(option.memory_bytes for option in options) / 2**30
        return (
            f"Nothing fits: the least is {least:.1f} GiB of {cluster.device_memory / 2**30:.1f} GiB a device; take "
            "more devices or fewer tokens."
        )
    if cluster.devices == 1:
        return "Do not use Hecate's copies on one device: there is nothing to balance."
    gains = f"{ep.step_ns / chosen.step_ns:.2f} x expert parallelism, {fsdp.step_ns / chosen.step_ns:.2f} x FSDP2"
    if best.policy == FSDP:
        return f"Do not use Hecate here: FSDP2 without expert parallelism is fastest ({gains})."
    if best.policy == "ep":
        return f"Do not use copies here: plain expert parallelism (policy='ep') is as fast ({gains})."
    groups = "all devices in one group"
    if best.group_size < cluster.devices:
        groups = f"a (replicate, shard) mesh of ({cluster.devices // best.group_size}, {best.group_size})"
    return (
        f"Use policy='{best.policy}', memory_slots={best.memory_slots}, rematerialize={best.rematerialize}, {groups}: "
        f"{gains}, {best.of_ceiling:.1%} of the ceiling."
    )
