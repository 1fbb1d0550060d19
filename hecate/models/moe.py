"""The MoE layer as plain PyTorch on one device: gate, stacked experts, weighted combine.

FSSDP is tested to give the same results as this layer. `hecate.fully_shard` replaces only `MoE.experts`, not the gate.

Shapes: T tokens, d model width, f expert hidden width, E experts, k experts per token, N = T * k (token, expert) rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hecate.ops.activation import activation
from hecate.ops.grouped import Groups, grouped_linear
from hecate.ops.plain import run_experts
from hecate.ranks.messages import all_reduce

__all__ = ["AuxScope", "Experts", "MoE", "Routing", "TopKGate"]

AuxScope = Literal["rank", "global"]


class Routing(NamedTuple):
    """Output of a gate.

    Attributes:
        expert_index: int64 `[T, k]`, the experts of each token, best first, all different.
        weights: `[T, k]`, at least float32, weights of the experts' outputs.
        aux_loss: scalar, at least float32: the load-balance loss of these tokens, or of the tokens of all ranks; 0 if
            there are no tokens.
    """

    expert_index: Tensor
    weights: Tensor
    aux_loss: Tensor


class TopKGate(nn.Module):
    """GShard's gate (arXiv 2006.16668, algorithm 1) without a capacity limit, so no token is dropped.

    Args:
        d_model: width of a token.
        num_experts: number of experts to choose from.
        top_k: experts per token.
        jitter: in training, the gate's input is scaled by uniform noise in [1 - jitter, 1 + jitter]; 0 turns it off.
        random_second_expert: in training, draw the experts after the first in proportion to their probability
            (without replacement, by Gumbel noise) instead of taking the most probable.
        aux_scope: tokens that the load-balance loss covers: "rank", those of this process, as in DDP, or "global",
            those of all ranks of the default process group, as one process would with the joined batch. "global" costs
            one all-reduce of `2 * num_experts + 1` numbers in every forward pass, which all ranks must run.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        jitter: float = 0.0,
        random_second_expert: bool = False,
        aux_scope: AuxScope = "rank",
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"TopKGate: top_k={top_k} must be in [1, num_experts={num_experts}]")
        if not 0 <= jitter < 1:
            raise ValueError(f"TopKGate: jitter={jitter} must be in [0, 1)")
        if aux_scope not in get_args(AuxScope):
            raise ValueError(f"TopKGate: aux_scope={aux_scope!r} must be one of {', '.join(get_args(AuxScope))}")
        self.num_experts, self.top_k, self.aux_scope = num_experts, top_k, aux_scope
        self.jitter, self.random_second_expert = jitter, random_second_expert
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def forward(self, hidden: Tensor) -> Routing:
        """`hidden` `[T, d]` of any float dtype; logits and probabilities are at least float32."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        hidden = hidden.to(dtype)
        if self.training and self.jitter:
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - self.jitter, 1 + self.jitter)
        probabilities = F.linear(hidden, self.weight.to(dtype)).softmax(dim=-1)
        index = self._choose(probabilities)
        weights = probabilities.gather(1, index)
        if self.top_k > 1:  # for top_k = 1 the weight would always be 1: no gradient for the gate
            weights = weights / weights.sum(dim=1, keepdim=True)
        return Routing(index, weights, self._aux_loss(probabilities, index[:, 0]))

    def _choose(self, probabilities: Tensor) -> Tensor:
        if not (self.training and self.random_second_expert and self.top_k > 1):
            return probabilities.topk(self.top_k, dim=1).indices
        scores = probabilities.detach().log()
        scores = scores - torch.empty_like(scores).exponential_().log()
        first = probabilities.argmax(dim=1, keepdim=True)
        others = scores.scatter(1, first, float("-inf")).topk(self.top_k - 1, dim=1).indices
        return torch.cat([first, others], dim=1)

    def _aux_loss(self, probabilities: Tensor, first: Tensor) -> Tensor:
        """E * sum over experts of (share of tokens that chose it first) * (mean probability); 1 for an even load."""
        chosen = torch.zeros_like(probabilities).scatter(1, first.unsqueeze(1), 1.0).sum(dim=0)
        likely = probabilities.sum(dim=0)
        tokens: int | Tensor = max(first.numel(), 1)
        if self.aux_scope == "global" and dist.is_available() and dist.is_initialized():
            chosen, likely, tokens = _of_all_ranks(chosen, likely, first.numel())
        return self.num_experts * (chosen / tokens * (likely / tokens)).sum()


def _of_all_ranks(chosen: Tensor, likely: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the ranks, in one all-reduce, of `chosen` `[E]`, `likely` `[E]` and `tokens` (result at least 1).

    The autograd graph covers only this rank's own probabilities. Gradients are averaged over the ranks afterwards, so
    this rank's gradient is multiplied by the number of ranks: the average is then the gradient of the loss over all
    tokens.
    """
    sums = torch.cat([chosen, likely.detach(), likely.new_full((1,), tokens)])
    all_reduce(sums)
    chosen, of_all, total = sums.split([len(chosen), len(likely), 1])
    return chosen, of_all + dist.get_world_size() * (likely - likely.detach()), total[0].clamp(min=1)


class Experts(nn.Module):
    """All experts of a layer: two-matrix GELU MLPs without bias, stacked. FSSDP replaces this module.

    Attributes:
        expert_weights: names of the stacked parameters, whose first dimension is E.
        up: `[E, f, d]`.
        down: `[E, d, f]`.
    """

    expert_weights = ("up", "down")

    def __init__(self, num_experts: int, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.empty(num_experts, d_hidden, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_hidden))

    @staticmethod
    def expert_mlp(x: Tensor, groups: Groups, weights: Mapping[str, Tensor]) -> Tensor:
        """The experts' outputs `[N, d]` for rows `x` `[N, d]` sorted by expert.

        Args:
            x: the rows.
            groups: number of rows per expert, in the order of the first dimension of `weights`.
            weights: name in `expert_weights` -> `[experts, ...]`, any subset of the experts in any order.
        """
        hidden = activation(grouped_linear(x, weights["up"], groups), "gelu", False, groups.kernels)
        return grouped_linear(hidden, weights["down"], groups)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over each token's experts, `[T, d]` in the dtype of `hidden`.

        Args:
            hidden: `[T, d]`.
            top_k_index: int64 `[T, k]`, each in [0, E); -1: no expert.
            top_k_weights: `[T, k]`.
        """
        weights = {name: getattr(self, name) for name in self.expert_weights}
        return run_experts(self.expert_mlp, weights, hidden, top_k_index, top_k_weights)


class MoE(nn.Module):
    """Gate and experts, used in place of a feed-forward network."""

    def __init__(self, gate: TopKGate, experts: Experts) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden` `[..., d]` to (output of the same shape, the gate's auxiliary loss).

        The loss is an output, not an attribute, so that recomputation, gradient accumulation and FSDP2 treat it like
        any other activation.
        """
        tokens = hidden.flatten(0, -2)
        routing: Routing = self.gate(tokens)
        output = self.experts(tokens, routing.expert_index, routing.weights)
        return output.view_as(hidden), routing.aux_loss
