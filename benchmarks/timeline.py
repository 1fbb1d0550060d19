"""One step under torch's profiler: seconds by kind, the Chrome trace, and a picture of Hecate's labels.

Only the CPU side is read. On CPU a label lasts as long as the work in it and what it waits for, so the seconds of
"counts" and "all_to_all" contain the wait for slower ranks, and those of "all_to_all" the permutation of rows as well.
The backward pass of the exchange runs in autograd's nodes and has no label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from torch.profiler import ProfilerActivity, profile

from hecate.labels import Verb
from hecate.train.distributed import World

if TYPE_CHECKING:
    from benchmarks.systems import System

__all__ = ["KINDS", "Span", "Timeline", "draw", "profiled"]

KINDS = {
    "plan": "plan",
    "count": "counts",
    "dispatch": "all_to_all",
    "combine": "all_to_all",
    "gather wait": "copies",
    "reduce wait": "gradients",
    "reshard": "reshard",
}
"""Label -> kind of exposed time. Copies that are added after the gate count as "copies" too."""

COLORS = {
    "plan": "tab:red",
    "count": "tab:orange",
    "dispatch": "tab:blue",
    "combine": "tab:cyan",
    "experts": "tab:green",
    "shared": "tab:olive",
    "gather": "tab:purple",
    "reduce": "tab:brown",
    "average": "tab:pink",
    "reshard": "tab:gray",
}


@dataclass(frozen=True)
class Span:
    """A label: its verb, the rest of its name, and when it began and ended, in seconds from the first label."""

    verb: str
    of: str
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One step of one system.

    Attributes:
        seconds: kind of `KINDS` -> seconds, mean over the ranks; empty without Hecate's labels.
        spans: labels of this rank.
        trace: torch's profile of this rank.
    """

    seconds: Mapping[str, float]
    spans: tuple[Span, ...]
    trace: profile


def profiled(system: System, world: World, number: int) -> Timeline:
    """Run step `number` of `system` under the profiler. Collective."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        system.step(number)
    spans = _spans(trace)
    kinds = list(dict.fromkeys(KINDS.values()))
    own = dict.fromkeys(kinds, 0.0)
    for span in spans:
        kind = KINDS.get(f"{span.verb} wait" if span.of == "wait" else span.verb)
        if kind is not None:
            own[kind] += span.end - span.begin
        elif span.verb == "shared":  # computes inside "dispatch", while the tokens travel
            own["all_to_all"] -= span.end - span.begin
    everyone = world.gather([float(bool(spans)), *own.values()]).mean(dim=0).tolist()
    seconds = dict(zip(kinds, everyone[1:], strict=True)) if everyone[0] else {}
    return Timeline(seconds, tuple(spans), trace)


def _spans(trace: profile) -> list[Span]:
    """The labels in `trace`; Hecate's operators have the same prefix, but are no labels."""
    events = []
    for event in trace.events() or []:
        verb, _, of = event.name.removeprefix("hecate::").partition(" ")
        if event.name.startswith("hecate::") and verb in get_args(Verb):
            events.append((verb, of, event.time_range))
    begin = min((times.start for _, _, times in events), default=0)
    return [Span(verb, of, (t.start - begin) / 1e6, (t.end - begin) / 1e6) for verb, of, t in events]


def draw(timelines: Mapping[str, Timeline], title: str, folder: Path) -> None:
    """Write `timeline.png`, a row per system that has labels, and a Chrome trace `<system>.trace.json` of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    folder.mkdir(parents=True, exist_ok=True)
    for name, timeline in timelines.items():
        timeline.trace.export_chrome_trace(str(folder / f"{name.replace(':', '_')}.trace.json"))
    drawn = {name: timeline for name, timeline in timelines.items() if timeline.spans}
    if not drawn:
        return
    figure, axes = pyplot.subplots(figsize=(12, 1 + 0.5 * len(drawn)), layout="constrained")
    for row, timeline in enumerate(drawn.values()):
        for span in timeline.spans:
            place = [(span.begin, span.end - span.begin)]
            axes.broken_barh(place, (row - 0.4, 0.8), color=COLORS[span.verb], alpha=0.8)
    axes.set_yticks(range(len(drawn)), list(drawn))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title)
    axes.legend(handles=[Patch(color=c, label=v) for v, c in COLORS.items()], ncols=len(COLORS), fontsize=7)
    figure.savefig(folder / "timeline.png", dpi=130)
    pyplot.close(figure)
