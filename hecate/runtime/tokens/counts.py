"""Exchange of token counts: how many tokens each device routes to each expert.

With the plain dispatch, this is the only place in a layer where the host waits for the accelerator.

Shapes: T tokens of this device, k experts per token, D devices, E experts.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hecate.errors import NonFiniteError
from hecate.ranks.same import check_equal
from hecate.runtime.comms import Comms

__all__ = ["ABSENT", "RECOMPUTED", "Position", "count_tokens"]

OUTSIDE, NOT_FINITE, STEP, LAYER, CALL, WITH_GRAD, TRAINED = range(7)
"""Columns after the experts' counts in the exchanged row."""

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

    def __str__(self) -> str:
        kind = f"with gradients of weight kinds {self.trained:b}" if self.with_grad else "without gradients"
        call = "a recomputation of " if self.call == RECOMPUTED else f"call {self.call + 1} of " if self.call else ""
        return f"{call}MoE layer {self.layer} {kind} after {self.step} optimizer steps"


def count_tokens(
    name: str, position: Position, index: Tensor, weights: Tensor, num_experts: int, comms: Comms
) -> NDArray[np.int64]:
    """Exchange how many tokens each device routes to each expert. Collective.

    Args:
        name: name of the layer, for errors.
        position: position of this rank.
        index: `[T, k]` expert of each token copy; -1: none.
        weights: `[T, k]` router weights; those of copies without an expert are not read.
        num_experts: E.
        comms: process groups of the ranks that share the experts.

    Returns:
        int64 `[D, E]`, on the host.

    Raises:
        ValueError: an index is outside [0, E) and not -1; on every rank, naming layer and rank.
        NonFiniteError: a weight is not finite; on every rank, naming layer and rank. With several replicas this is not
            raised, because other replicas would hang; the loss and the gradient norm then become NaN on all ranks.
        RuntimeError: ranks are in different forward passes or layers; on every rank.
    """
    row = _row(position, index, weights, num_experts)
    table = row.new_empty(comms.topology.num_devices, row.numel())
    if comms.tokens is None:
        table[0] = row
    else:
        dist.all_gather(list(table.unbind(0)), row, group=comms.tokens)
    everything = table.cpu().numpy()
    counts, others = everything[:, :num_experts], everything[:, num_experts:]
    _check_position(name, position, others[:, STEP:])
    _check_range(name, others[:, OUTSIDE], num_experts)
    if comms.replicas is None or comms.replicas.size() == 1:
        _check_finite(name, others[:, NOT_FINITE])
    return counts


def _row(position: Position, index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """int64 `[E + 7]`: this rank's counts, then the columns that all ranks check."""
    valid, absent = (index >= 0) & (index < num_experts), index == ABSENT
    # Copies without an expert go to a column that the next line overwrites.
    slot = torch.where(valid, index, num_experts + OUTSIDE + absent.to(index.dtype)).flatten()
    row = torch.zeros(num_experts + TRAINED + 1, dtype=torch.int64, device=index.device)
    row.scatter_add_(0, slot, torch.ones_like(slot, dtype=torch.int64))
    row[num_experts + NOT_FINITE] = (~(torch.isfinite(weights.detach()) | absent)).sum()
    for column, value in enumerate(astuple(position), num_experts + STEP):
        row[column].fill_(int(value))
    return row


def _check_position(name: str, own: Position, columns: NDArray[np.int64]) -> None:
    if (columns == np.array(astuple(own))).all():
        return
    rows = columns.tolist()
    everyone = [{"the pass": Position(step, layer, call, bool(grad), bits)} for step, layer, call, grad, bits in rows]
    rule = (
        "call the model equally often, in the same mode and with the same parameters frozen (generate() of unequal "
        "lengths needs synced_gpus=True)"
    )
    check_equal(name, everyone, rule, RuntimeError)


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
