"""What happened in the last step, per layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.planning.plan import Plan
from hecate.runtime.pool import local_tensor

__all__ = ["LayerTotals", "PeakMemory"]


class PeakMemory:
    """Bytes of parameters, optimizer state and gradients on this device: the most that was measured.

    Attributes:
        peaks: by kind.
    """

    def __init__(self) -> None:
        self.peaks = {"owned": 0, "optimizer": 0, "gradients": 0}

    def measure(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Look once, after a step and before its gradients are dropped."""
        parameters: list[Tensor] = list(model.parameters())
        state: list[object] = [v for o in optimizers for values in o.state.values() for v in values.values()]
        found: dict[str, list[Tensor]] = {
            "owned": parameters,
            "optimizer": [v for v in state if isinstance(v, Tensor)],
            "gradients": [p.grad for p in parameters if p.grad is not None],
        }
        self.peaks = {kind: max(peak, _num_bytes(found[kind])) for kind, peak in self.peaks.items()}


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes on this device."""
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))


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
