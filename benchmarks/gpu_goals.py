"""What `gpu_check.py` has to show: goals for its figures, and whether a run reached them.

A goal holds for all figures that it is about, so the worst of them is what counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.report import Row

__all__ = ["GOALS", "Goal", "Verdict", "table", "verdicts"]


@dataclass(frozen=True)
class Goal:
    """A bound for figures.

    Attributes:
        what: the figures, in words.
        subject, metric: of their rows, regular expressions for the whole text.
        least, most: bounds, of which at most one is given; neither: the figure is stated only.
        setting: of their rows, a regular expression for the beginning.
    """

    what: str
    subject: str
    metric: str
    least: float | None = None
    most: float | None = None
    setting: str = ""

    def is_about(self, row: Row) -> bool:
        """Whether `row` is one of its figures."""
        whole = re.fullmatch(self.subject, row.subject) and re.fullmatch(self.metric, row.metric)
        return bool(whole and re.match(self.setting, row.setting))

    @property
    def stated(self) -> bool:
        """Whether it has no bound."""
        return self.least is None and self.most is None

    def __str__(self) -> str:
        bound = "stated" if self.stated else f">= {self.least:g}" if self.most is None else f"<= {self.most:g}"
        return f"{self.what}: {bound}"


def _layer(model: str, least: float) -> list[Goal]:
    return [
        Goal(f"{model}, {way}, % of a large product", "hecate", f"{way} of the product", least=least, setting=model)
        for way in ("forward", "backward")
    ]


GOALS: tuple[Goal, ...] = (
    Goal("moving rows of tokens, % of a large copy", "permute .*", "of the copy", least=85),
    Goal("weighted sum and its backward, % of a large copy", "combine.*", "of the copy", least=85),
    Goal("packing with a cast, % of a large copy", "pack and cast", "of the copy", least=85),
    Goal("adding gradients, % of a large copy", "accumulate .*", "of the copy", least=85),
    *_layer("Mixtral-8x7B", 60),
    *_layer("DeepSeek-V3", 60),
    *_layer("Qwen3-30B-A3B", 45),
    Goal("layer, speed over its grouped products alone", "hecate", "speed over grouped products alone", least=0.85),
    Goal(
        "layer, speed over transformers, geometric mean",
        *("hecate", "speed over transformers' grouped path"),
        least=1.2,
        setting="geometric mean",
    ),
    Goal("sparse all-gather, % of a large copy", "spAG .*", "of the copy", least=80),
    Goal("sparse reduce-scatter, % of a large copy", "spRS .*", "of the copy", least=80),
    Goal("both behind attention, exposed % of it", "sp(AG|RS) .*", "exposed behind attention", most=5),
    Goal("host time per layer and direction, us", "hecate.*", "host time (forward|backward)", most=300),
    Goal("waits of the host in a layer", "hecate", "waits of the host in a layer", most=1),
    Goal("waits of the host, splits on the device", "hecate, splits.*", "waits of the host in a layer", most=0),
    Goal("quota of 64 devices, 256 experts, us", "quota, 64 devices, 256 experts", "time", most=60),
    Goal("GPT-MoE-S, tokens per second", "hecate", "tokens per second", setting="GPT-MoE-S"),
    Goal("GPT-MoE-S, % of a large product", "hecate", "6 operations per active weight.*", setting="GPT-MoE-S"),
)
"""What `make gpu-check` is to show, in the order of its steps' subjects."""


@dataclass(frozen=True)
class Verdict:
    """A goal, its worst figure (None: not measured), how many figures there were, and whether all reached it."""

    goal: Goal
    worst: float | None
    figures: int
    reached: bool

    @property
    def word(self) -> str:
        """Reached, missed, stated or not measured."""
        if self.worst is None:
            return "not measured"
        return "stated" if self.goal.stated else "reached" if self.reached else "missed"


def verdicts(rows: Iterable[Row], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """What the figures say of each goal. A figure that is not a number reaches nothing."""
    rows, found = list(rows), []
    for goal in goals:
        values = [row.value for row in rows if goal.is_about(row)]
        within = [
            (goal.least is None or value >= goal.least) and (goal.most is None or value <= goal.most)
            for value in values
        ]
        worst = None if not values else max(values) if goal.most is not None else min(values)
        found.append(Verdict(goal, worst, len(values), bool(values) and all(within)))
    return found


def table(found: Sequence[Verdict]) -> str:
    """A line per goal."""
    lines = []
    for verdict in found:
        worst = "" if verdict.worst is None else f"{verdict.worst:.4g}"
        several = f" (worst of {verdict.figures})" if verdict.figures > 1 else ""
        lines.append(f"{verdict.word:12}  {worst:>10}  {verdict.goal}{several}")
    return "\n".join(lines)
