"""Statistics of the last step, per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hecate.loads.predict import predict
from hecate.ops.upload import upload
from hecate.planning.calibrate import parts_per_million, target_load
from hecate.planning.limits import CopyLimits
from hecate.planning.plan import Plan
from hecate.planning.planner import lower_bound
from hecate.policies.base import LayerSetting
from hecate.ranks.messages import all_reduce
from hecate.runtime.plans.reasons import milliseconds

__all__ = ["LayerTotals", "SummedLoads"]


@dataclass
class LayerTotals:
    """Sums over the micro-batches of one step.

    Attributes:
        counts: int64 `[D, E]`, tokens that each device routed to each expert.
        before, after: sum over micro-batches of the largest device load, without and with copies.
        mean: sum over micro-batches of the mean device load.
        top_k: experts per token.
        micro_batches: number of micro-batches.
        bytes_sent: bytes sent by all devices together for copies and their gradients.
        last: the plan of the last micro-batch; None before the first.
        planned_from: the counts of past steps, int64 `[D, E]` each, from which the step's copies were planned.
        loads_before, loads_after: int64 `[D]`, tokens of each device, without and with copies.
    """

    counts: NDArray[np.int64]
    before: int = 0
    after: int = 0
    mean: float = 0.0
    top_k: int = 1
    micro_batches: int = 0
    bytes_sent: int = 0
    last: Plan | None = None
    planned_from: tuple[NDArray[np.int64], ...] = ()
    loads_before: NDArray[np.int64] = field(init=False)
    loads_after: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.loads_before = self.loads_after = np.zeros(len(self.counts), dtype=np.int64)

    def add(self, counts: NDArray[np.int64], plan: Plan, top_k: int) -> None:
        """Add one micro-batch to the totals."""
        num_devices = counts.shape[0]
        owned_loads = np.bincount(plan.owners, weights=counts.sum(axis=0), minlength=num_devices).astype(np.int64)
        self.loads_before = self.loads_before + owned_loads
        self.loads_after = self.loads_after + plan.device_loads
        self.counts = self.counts + counts
        self.before += int(owned_loads.max())
        self.after += int(plan.device_loads.max())
        self.mean += float(counts.sum()) / num_devices
        self.top_k = top_k
        self.micro_batches += 1
        self.last = plan

    @property
    def tokens_per_device(self) -> int:
        """Mean tokens per device and micro-batch."""
        return int(self.counts.sum()) // max(1, self.counts.shape[0] * self.top_k * self.micro_batches)

    def report(self, name: str, setting: LayerSetting) -> dict[str, Any]:
        """The totals as a dictionary for `FSSDP.stats()`; without tokens, imbalances are 1.

        Args:
            name: name of the layer.
            setting: the setting it was planned under.
        """
        bound = 1.0 if self.last is None else _bound(self.last, setting)
        predicted = predict(np.stack(self.planned_from)) if self.planned_from else None
        copied, calibrated = _copied(self.last)
        return {
            "name": name,
            "counts": self.counts,
            "imbalance_before": self.before / self.mean if self.mean else 1.0,
            "imbalance_after": self.after / self.mean if self.mean else 1.0,
            "lower_bound": bound,
            "limited_by": None if self.last is None else _limited_by(self.last, setting, bound),
            "copies": 0 if self.last is None else self.last.copies,
            "crossings": 0 if self.last is None else self.last.crossings,
            "bytes": self.bytes_sent,
            "copied": copied,
            "calibrated": calibrated,
            "no_copies": None,
            "device_loads_before": self.loads_before,
            "device_loads_after": self.loads_after,
            "predicted": predicted,
            "mispredicted": None if predicted is None else _mispredicted(predicted, self.counts.sum(axis=0)),
        }


class SummedLoads:
    """The loads of one step, summed over replicas asynchronously. Making one is collective.

    Args:
        loads: per layer, int64 `[E]`, loads of this replica.
        replicas: group of the devices that own the same experts, or None.
        device: device of the tensor that is reduced.
    """

    def __init__(
        self, loads: Sequence[NDArray[np.int64]], replicas: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self._loads = list(loads)
        self._sum: torch.Tensor | None = None
        if replicas is not None and loads:
            self._sum = upload(torch.from_numpy(np.concatenate(loads)), device)
            self._wait = all_reduce(self._sum, group=replicas, async_op=True)

    def result(self) -> list[NDArray[np.int64]]:
        """Per layer, int64 `[E]`; waits for the sum."""
        if self._sum is not None:
            self._wait()
            ends = np.cumsum([len(load) for load in self._loads])[:-1]
            self._loads, self._sum = np.split(self._sum.cpu().numpy(), ends), None
        return self._loads


def _mispredicted(predicted: NDArray[np.int64], loads: NDArray[np.int64]) -> float:
    """Share of the tokens that are at other experts than predicted: 0 if all shares of loads are equal, at most 1."""
    shares = predicted / max(1, predicted.sum()) - loads / max(1, loads.sum())
    return float(np.abs(shares).sum()) / 2


def _copied(plan: Plan | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The copies of a plan, (expert, device), and whether each was made after the gate."""
    copied = np.zeros((0, 2), dtype=np.int64) if plan is None else plan.copied
    if plan is None or plan.calibration is None:
        return copied, np.zeros(len(copied), dtype=bool)
    return copied, ~plan.calibration.before.matrix[copied[:, 0], copied[:, 1]]


def _bound(plan: Plan, setting: LayerSetting) -> float:
    """A lower bound of max/mean device load for the plan's loads and the layer's memory slots."""
    limits = CopyLimits.of(setting.topology, setting.memory_slots)
    return lower_bound(plan.counts.sum(axis=0), plan.owners, setting.topology, limits)


def _limited_by(plan: Plan, setting: LayerSetting, bound: float) -> str | None:
    """What keeps the largest device load above `max_imbalance`; None if nothing does."""
    loads, dial = plan.device_loads, setting.max_imbalance
    if int(loads.max()) <= target_load(int(loads.sum()), len(loads), parts_per_million(dial)):
        return None
    missed = f"imbalance {plan.imbalance:.3f} > max_imbalance={dial:g}"
    if bound > dial:
        return f"{missed}: memory_slots={setting.memory_slots} allow {bound:.3f} at best"
    if not setting.calibrate:
        return f"{missed}: calibrate=False, so copies are planned from past loads alone"
    if setting.calibrate == "pays":
        return f"{missed}: by the cost model further copies cost more than they save{_weighed(plan)}"
    return f"{missed}: the policy found no better copies within memory_slots={setting.memory_slots}"


def _weighed(plan: Plan) -> str:
    known = plan.calibration
    if known is None or known.saved_ns is None or known.price_ns is None:
        return ""
    return f" ({milliseconds(known.price_ns)} against {milliseconds(known.saved_ns)})"
