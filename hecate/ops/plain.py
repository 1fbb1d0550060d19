"""The experts of one layer on one device: what FSSDP must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hecate.ops.grouped import Groups

__all__ = ["run_experts"]


def run_experts(
    mlp: Callable[[Tensor, Groups, Mapping[str, Tensor]], Tensor],
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Weighted sum over each token's experts, `[T, d]` in the dtype of `hidden`. The host waits for the row counts.

    Args:
        mlp: `(rows [N, d] sorted by expert, groups, weights) -> [N, d]`.
        weights: name -> `[E, ...]`.
        hidden: `[T, d]`.
        top_k_index: int64 `[T, k]`, each in [0, E); -1: no expert.
        top_k_weights: `[T, k]`; those of entries without an expert are not read.
    """
    num_experts = next(iter(weights.values())).shape[0]
    expert, order = top_k_index.flatten().sort(stable=True)
    absent, *sizes = torch.bincount(expert + 1, minlength=num_experts + 1).tolist()
    order = order[absent:]
    output = mlp(hidden[order // top_k_index.shape[1]], Groups.of(sizes, hidden.device), weights)
    by_token = output.new_zeros(expert.numel(), output.shape[1]).index_copy(0, order, output)
    shares = top_k_weights.masked_fill(top_k_index < 0, 0).unsqueeze(-1)
    return (by_token.unflatten(0, top_k_index.shape) * shares).sum(dim=1).to(hidden.dtype)
