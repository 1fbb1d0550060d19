"""What happened in the last step, per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecate.planning.plan import Plan

__all__ = ["LayerTotals"]


@dataclass
class LayerTotals:
    """Sums over the micro-batches of one step.

    Attributes:
        counts: int64 `[D, E]`, (token, expert) pairs routed.
        before, after: sums over micro-batches of the largest device load, without and with copies.
        mean: sum of the mean device loads.
        copies: experts held beyond their owner, of the last micro-batch.
        top_k: experts a token.
        micro_batches: how many.
        bytes_sent: by all devices together, for copies and their gradients.
    """

    counts: NDArray[np.int64]
    before: int = 0
    after: int = 0
    mean: float = 0.0
    copies: int = 0
    top_k: int = 1
    micro_batches: int = 0
    bytes_sent: int = 0

    def add(self, counts: NDArray[np.int64], owners: NDArray[np.int64], plan: Plan, top_k: int) -> None:
        """Count one micro-batch."""
        num_devices = counts.shape[0]
        owned_loads = np.bincount(owners, weights=counts.sum(axis=0), minlength=num_devices)
        self.counts = self.counts + counts
        self.before += int(owned_loads.max())
        self.after += int(plan.device_loads.max())
        self.mean += float(counts.sum()) / num_devices
        self.copies = plan.copies
        self.top_k = top_k
        self.micro_batches += 1

    @property
    def tokens_per_device(self) -> int:
        """Mean tokens of a device in a micro-batch."""
        return int(self.counts.sum()) // max(1, self.counts.shape[0] * self.top_k * self.micro_batches)

    def report(self, name: str) -> dict[str, Any]:
        """What was counted, for the layer called `name`; an imbalance without tokens is 1."""
        return {
            "name": name,
            "counts": self.counts,
            "loads": self.counts.sum(axis=0),
            "imbalance_before": self.before / self.mean if self.mean else 1.0,
            "imbalance_after": self.after / self.mean if self.mean else 1.0,
            "copies": self.copies,
            "bytes": self.bytes_sent,
        }
