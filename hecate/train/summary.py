"""Summary of a run in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hecate.train.settings import Settings

__all__ = ["Totals", "summarize"]

LN2 = math.log(2)
SUMMED = ("tokens", "seconds", "imbalance_before", "imbalance_after", "copies", "bytes_copied", "exposed_seconds")


class Totals:
    """Sums over the steps of a run, computed in one pass without holding all steps in memory.

    Args:
        metrics: metrics of the steps, in order.
        window: number of steps at the beginning in which the load history is short.

    Attributes:
        taken, skipped: number of steps taken, and skipped.
        last: metrics of the last step taken; None if none was.
        sums: sums over all steps taken.
        steady, steady_steps: sums and number of steps after the first `window`, or of all steps if there are no more.
    """

    def __init__(self, metrics: Iterable[Mapping[str, Any]], window: int) -> None:
        self.taken = self.skipped = 0
        self.last: Mapping[str, Any] | None = None
        first, rest = (dict.fromkeys(SUMMED, 0.0) for _ in range(2))
        for step in metrics:
            if "loss" not in step:
                self.skipped += 1
                continue
            sums = first if self.taken < window else rest
            for name in SUMMED:
                sums[name] += step[name]
            self.taken, self.last = self.taken + 1, step
        self.sums = {name: first[name] + rest[name] for name in SUMMED}
        self.steady, self.steady_steps = (rest, self.taken - window) if self.taken > window else (first, self.taken)


def summarize(
    totals: Totals, settings: Settings, validation: Mapping[str, Any], bytes_per_token: float | None
) -> dict[str, Any]:
    """Summary of a run; means are over the steps after the first `load_window`, in which the load history is short.

    Args:
        totals: sums over the steps.
        settings: the settings of the run.
        validation: `validation_loss` in nats per token, and, if that is not finite, `validation_non_finite`.
        bytes_per_token: mean bytes of text per token; None if unknown.
    """
    assert totals.last is not None, "no step was taken"
    bits = validation["validation_loss"] / LN2
    sums, steady = totals.sums, totals.steady
    return {
        "name": settings.name,
        "policy": settings.fssdp.policy,
        "devices": settings.devices,
        "steps": totals.taken,
        "tokens": int(sums["tokens"]),
        "train_loss": totals.last["loss"],
        "val_bits_per_token": bits,
        "val_bits_per_byte": bits / bytes_per_token if bytes_per_token else None,
        "tokens_per_second": steady["tokens"] / steady["seconds"],
        "imbalance_before": steady["imbalance_before"] / totals.steady_steps,
        "imbalance_after": steady["imbalance_after"] / totals.steady_steps,
        "copies_per_step": steady["copies"] / totals.steady_steps,
        "bytes_copied": int(sums["bytes_copied"]),
        "exposed_seconds": sums["exposed_seconds"],
        "seconds": sums["seconds"],
        "skipped_steps": totals.skipped,
        **{name: text for name, text in validation.items() if name == "validation_non_finite"},
    }
