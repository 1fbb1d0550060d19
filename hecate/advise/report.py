"""What the adviser says: a frozen record and its table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Advice", "Option", "plot"]

GIB = 2**30


@dataclass(frozen=True)
class Option:
    """One way of training that was simulated.

    Attributes:
        policy: one of Hecate's policies, or "fsdp": FSDP2 without expert parallelism.
        memory_slots, rematerialize: see `hecate.FSSDPConfig`.
        group_size: devices that share the experts.
        grouped: whether these are not all devices; the other groups are replicas (HSDP).
        step_ms: time of a step.
        of_ceiling: throughput as a share of that with an even load and nothing to copy.
        imbalance: max/mean device load, with copies.
        exposed_ms: time that compute waits for copies and their gradients, or is slowed down by them.
        memory_bytes: of the fullest device.
        fits: whether that is at most the device's memory.
    """

    policy: str
    memory_slots: int
    rematerialize: bool
    group_size: int
    grouped: bool
    step_ms: float
    of_ceiling: float
    imbalance: float
    exposed_ms: float
    memory_bytes: int
    fits: bool

    @property
    def name(self) -> str:
        """In a table."""
        if self.policy in ("ep", "fsdp"):
            return {"ep": "expert parallelism", "fsdp": "FSDP2, no expert parallelism"}[self.policy]
        words = f"{self.policy}, {self.memory_slots} slots"
        words += ", RM" if self.rematerialize else ""
        words += f", groups of {self.group_size}" if self.grouped else ""
        return words


@dataclass(frozen=True)
class Advice:
    """What to use and what it gives. Made by `hecate.advise`.

    Attributes:
        model, cluster: names.
        devices: of the cluster.
        tokens: of a device in a step.
        assumed: what the figures rest on, in words.
        best: the fastest option that fits; None if none fits.
        options: all that were simulated.
        over_ep, over_fsdp: throughput of `best` over expert parallelism and over FSDP2 without it.
        imbalance: max/mean device load without copies.
        break_even_imbalance: from which imbalance of generated loads on Hecate's copies make training at least 1 %
            faster than expert parallelism; None: at none that was tried.
        break_even_tokens: from how many tokens of a device with the loads that were passed; None: at no number tried.
        pays_over_fsdp_up_to: up to how many tokens of a device copies are faster than FSDP2 without expert parallelism,
            whose traffic does not grow with tokens; None: at no number tried.
        over_ep_by_imbalance, over_ep_by_tokens, over_fsdp_by_tokens: (imbalance or tokens, throughput of copies over
            that of the other) that were tried.
        memory_by_kind: bytes of the best option (or of the smallest, if none fits), by kind.
        device_memory: bytes of a device.
        verdict: one sentence: use it, or do not, and why.
    """

    model: str
    cluster: str
    devices: int
    tokens: int
    assumed: str
    best: Option | None
    options: tuple[Option, ...]
    over_ep: float
    over_fsdp: float
    imbalance: float
    break_even_imbalance: float | None
    break_even_tokens: int | None
    pays_over_fsdp_up_to: int | None
    over_ep_by_imbalance: tuple[tuple[float, float], ...]
    over_ep_by_tokens: tuple[tuple[int, float], ...]
    over_fsdp_by_tokens: tuple[tuple[int, float], ...]
    memory_by_kind: Mapping[str, int]
    device_memory: int
    verdict: str

    def __str__(self) -> str:
        head = f"{self.model} on {self.devices} devices of {self.cluster}, {self.tokens} tokens a device and step"
        lines = [head, self.assumed, "", _row("", "step", "of ceiling", "imbalance", "exposed", "memory", "")]
        lines += [
            _row(
                option.name,
                f"{option.step_ms:.1f} ms",
                f"{option.of_ceiling:.1%}",
                f"{option.imbalance:.3f}",
                f"{option.exposed_ms:.1f} ms",
                f"{option.memory_bytes / GIB:.1f} GiB",
                " <- use this" if option is self.best else "" if option.fits else " does not fit",
            )
            for option in self.options
        ]
        lines += ["RM: re-materialization.", "", self.verdict, *self._break_even(), "", self._memory()]
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self) -> str:
        """All attributes."""
        return json.dumps(asdict(self), indent=1)

    def _break_even(self) -> list[str]:
        imbalance, tokens = self.break_even_imbalance, self.break_even_tokens
        most = max((i for i, _ in self.over_ep_by_imbalance), default=0.0)
        return [
            f"Copies pay, against expert parallelism, from imbalance {imbalance:.2f} of generated loads."
            if imbalance
            else f"Copies pay, against expert parallelism, at no imbalance of generated loads up to {most:.2f}.",
            f"With the loads above they pay from {tokens} tokens a device."
            if tokens
            else "With the loads above they pay at no number of tokens that was tried.",
            f"Against FSDP2 without expert parallelism they pay up to {self.pays_over_fsdp_up_to} tokens a device."
            if self.pays_over_fsdp_up_to
            else "Against FSDP2 without expert parallelism they pay at no number of tokens that was tried.",
        ]

    def _memory(self) -> str:
        kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in self.memory_by_kind.items() if size)
        return f"memory of a device in GiB (it has {self.device_memory / GIB:.1f}): {kinds}"


def _row(name: str, *cells: str) -> str:
    *numbers, mark = cells
    return f"{name:32}" + "".join(f"{cell:>12}" for cell in numbers) + mark


def plot(advice: Advice, path: str | Path) -> None:
    """Draw throughput over expert parallelism by imbalance and by tokens to a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for axes, points, label in (
        (left, advice.over_ep_by_imbalance, "expert parallelism"),
        (right, advice.over_ep_by_tokens, "expert parallelism"),
        (right, advice.over_fsdp_by_tokens, "FSDP2, no expert parallelism"),
    ):
        axes.axhline(1, color="gray", linewidth=0.8)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"over {label}")
    left.set_xlabel("imbalance without copies (max/mean device load)")
    right.set_xlabel("tokens of a device in a step")
    right.set_xscale("log", base=2)
    tokens = [count for count, _ in advice.over_ep_by_tokens]
    right.set_xticks(tokens, [str(count) for count in tokens])
    left.set_ylabel("throughput with copies / other")
    right.legend(fontsize=8)
    figure.suptitle(f"{advice.model}, {advice.devices} devices of {advice.cluster}", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
