"""Exchange of token counts: how many tokens each device routes to each expert.

Shapes: T tokens of this device, k experts per token, D devices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.errors import NonFiniteError
from hecate.ops.kernels.registered import count_experts
from hecate.ops.kernels.tokens import ExpertCounts
from hecate.ops.upload import upload
from hecate.ranks.messages import HostCopy, all_gather_into, to_host
from hecate.ranks.same import check_equal
from hecate.runtime.comms import Comms

__all__ = ["Counting", "Position"]

ABOVE, BELOW, NONE, NOT_FINITE, STEP, LAYER, CALL, WITH_GRAD, TRAINED = range(9)
"""Columns of the exchanged row after the experts' counts.

The first three count copies: those whose index is E or more, less than -1, and `ABSENT`. The counting kernel puts the
first two together.
"""

REMEDY = "give a batch without images one blank image, and add its output times zero"
"""What to do if some ranks skip a part of the model."""

ABSENT = -1
"""The index of a token copy that goes to no expert."""

RECOMPUTED = -1
"""The `call` of a recomputation."""


@dataclass(frozen=True)
class Position:
    """Where a rank is in training; it must be the same on all ranks of a group.

    Attributes:
        step: optimizer steps so far.
        layer: index of the MoE layer in the model.
        call: earlier calls of the layer in this forward pass; `RECOMPUTED` in a recomputation.
        with_grad: whether a backward pass may follow.
        trained: bit i tells whether the experts' weight kind number i requires a gradient.
    """

    step: int
    layer: int
    call: int
    with_grad: bool
    trained: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """What ranks compare, in the order of the columns."""
        return self.step, self.layer, self.call, int(self.with_grad), self.trained

    def __str__(self) -> str:
        kind = f"with gradients of weight kinds {self.trained:b}" if self.with_grad else "without gradients"
        call = "a recomputation of " if self.call == RECOMPUTED else f"call {self.call + 1} of " if self.call else ""
        return f"{call}MoE layer {self.layer} {kind} after {self.step} optimizer steps"


class Counting:
    """Counts of all devices on their way to the host. Making one launches the exchange. Collective.

    Args:
        position: position of this rank.
        index: `[T, k]` expert of each token copy; -1: none.
        weights: `[T, k]` router weights; those of copies without an expert are not read.
        experts: number of experts of each layer. Rows have room for the most, so that ranks that are in different
            layers can tell.
        comms: process groups of the ranks that share the experts.
        by_kernels: whether Hecate's kernel counts.

    Attributes:
        counted: this rank's counts, as the kernel left them; None without it.
    """

    def __init__(
        self,
        position: Position,
        index: Tensor,
        weights: Tensor,
        experts: Sequence[int],
        comms: Comms,
        by_kernels: bool = False,
    ) -> None:
        self._position, self._comms = position, comms
        self._num_experts, self._most = experts[position.layer], max(experts)
        self._top_k = max(1, index.shape[1])
        self.counted = count_experts(index, self._num_experts) if by_kernels else None
        row = _row(position, index, weights, self._num_experts, self._most, self.counted)
        self._table, self._arrived = row, None
        self._copy: HostCopy | None = None
        if comms.tokens is not None:
            self._table = row.new_empty(comms.topology.num_devices * row.numel())
            self._arrived = all_gather_into(self._table, row, comms.tokens, async_op=True)

    @cached_property
    def on_device(self) -> Tensor:
        """int64 `[D, E]`: token copies per device and expert, on the device. The host does not wait, but over gloo."""
        return self._everyones[:, : self._num_experts].contiguous()

    def send_to_host(self) -> None:
        """Launch the copy to the host for which a later `wait` waits, and for nothing that is launched after it."""
        self._copy = HostCopy(self._everyones)

    @cached_property
    def _everyones(self) -> Tensor:
        """The rows of all devices, which what is launched next on the current stream may read."""
        if self._arrived is not None:
            self._arrived()
        return self._table.view(self._comms.topology.num_devices, -1)

    def wait(self, names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Wait for the counts: the only place in a layer where the host waits for the accelerator.

        After `send_to_host` that may be much later than in the layer.

        Args:
            names: names of all layers, for errors.

        Returns:
            Int64 `[D, E]`, token copies per device and expert, and int64 `[D]`, tokens per device.

        Raises:
            ValueError: an index is outside [0, E) and not -1; on every rank, naming layer and rank.
            NonFiniteError: a weight is not finite; on every rank, naming layer and rank. With several replicas this is
                not raised, because other replicas would hang; the loss and the gradient norm then become NaN on all
                ranks.
            RuntimeError: ranks are in different forward passes or layers; on every rank.
        """
        table = _on_host(self._everyones) if self._copy is None else self._copy.wait().numpy()
        counts, others = table[:, : self._num_experts], table[:, self._most :]
        name = names[self._position.layer]
        _check_position(names, self._position, others[:, STEP:])
        _check_range(name, others[:, ABOVE] + others[:, BELOW], self._num_experts)
        replicas = self._comms.replicas
        if replicas is None or replicas.size() == 1:
            _check_finite(name, others[:, NOT_FINITE])
        copies = counts.sum(axis=1) + others[:, NONE]
        return np.ascontiguousarray(counts), copies // self._top_k


def _on_host(table: Tensor) -> NDArray[np.int64]:
    """Copy `table` to the host with one transfer and one wait."""
    return table.numpy() if table.device.type == "cpu" else to_host([table])[0].numpy()


def _row(
    position: Position, index: Tensor, weights: Tensor, num_experts: int, most: int, counted: ExpertCounts | None
) -> Tensor:
    """int64 `[most + 9]`: this rank's counts, then the columns that all ranks check."""
    start = np.zeros(most + TRAINED + 1, dtype=np.int64)
    start[most + STEP :] = position.numbers
    row = upload(torch.from_numpy(start), index.device)
    if counted is None:
        _count(row, index, num_experts, most)
    else:
        row[:num_experts] = counted.counts[:num_experts]
        row[most + ABOVE : most + NONE + 1 : 2] = counted.counts[num_experts:]
    own = weights.detach().masked_fill(index == ABSENT, 0)
    row[most + NOT_FINITE] = (own - own).count_nonzero()  # NaN if a weight is not finite
    return row


def _count(row: Tensor, index: Tensor, num_experts: int, most: int) -> None:
    """Add the copies of `index` to the columns of `row`."""
    slot = index.flatten().clamp(-2, num_experts).remainder_(most + 3)  # -2 and -1 become the columns BELOW and NONE
    if num_experts < most:
        slot.masked_fill_(slot == num_experts, most + ABOVE)
    row.scatter_add_(0, slot, slot.new_ones(1).expand_as(slot))


def _check_position(names: Sequence[str], own: Position, columns: NDArray[np.int64]) -> None:
    if (columns == own.numbers).all():
        return
    rows = columns.tolist()
    everyone = [{"the pass": Position(step, layer, call, bool(grad), bits)} for step, layer, call, grad, bits in rows]
    rule = (
        "call the model equally often, in the same mode and with the same parameters frozen (generate() of unequal "
        "lengths needs synced_gpus=True)"
    )
    layers = [int(layer) for layer in columns[:, 1]]
    if len(set(layers)) > 1:
        ranks = {layer: [rank for rank, n in enumerate(layers) if n == layer] for layer in sorted(set(layers))}
        reached = " and ".join(f"{names[layer]} was reached by ranks {on}" for layer, on in ranks.items())
        rule += f". {reached}: all ranks must run the same MoE layers; {REMEDY}"
    check_equal(names[own.layer], everyone, rule, RuntimeError)


def _check_range(layer: str, outside: NDArray[np.int64], num_experts: int) -> None:
    for rank in np.flatnonzero(outside):
        raise ValueError(
            f"{layer}: the router of rank {rank} chose {outside[rank]} experts outside [0, {num_experts}); "
            f"the layer has {num_experts} experts, and {ABSENT} means none"
        )


def _check_finite(layer: str, not_finite: NDArray[np.int64]) -> None:
    for rank in np.flatnonzero(not_finite):
        raise NonFiniteError(
            f"{layer}: the router of rank {rank} gave {not_finite[rank]} weights that are NaN or infinite"
        )
