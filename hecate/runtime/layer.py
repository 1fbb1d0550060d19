"""One MoE layer under FSSDP: from the router's choice to the combined output, forward and backward.

Shapes: T tokens of this device, k experts a token, d model width, D devices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hecate.ops.grouped import Groups
from hecate.planning.plan import Plan
from hecate.runtime.chunk import ExpertsSpec
from hecate.runtime.copies import LayerCopies
from hecate.runtime.dispatch import Dispatch, NodeDispatch, bring_back, send_out

if TYPE_CHECKING:
    from hecate.runtime.engine import Engine

__all__ = ["FSSDPExperts", "LayerRecord"]


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did with one micro-batch; recomputation and backward replay it (DESIGN, decision 5)."""

    counts: NDArray[np.int64]
    plan: Plan
    dispatch: Dispatch | NodeDispatch
    copies: LayerCopies


class FSSDPExperts(nn.Module):
    """Stands where the model's experts module stood; its weights live in the engine's pool."""

    def __init__(self, engine: Engine, index: int, spec: ExpertsSpec) -> None:
        super().__init__()
        # In a list, so that nn.Module does not take it for a submodule; the engine holds the model.
        self._engine = [engine]
        self.index = index
        self.spec = spec

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted outputs of each token's experts.

        Args:
            hidden_states: `[T, d]`.
            top_k_index: int64 `[T, k]`.
            top_k_weights: `[T, k]`.

        Returns:
            `[T, d]` in the dtype of `hidden_states`.
        """
        with self._engine[0].comms.guard():
            return self._run(self._engine[0], hidden_states, top_k_index, top_k_weights)

    def _run(self, engine: Engine, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        record = engine.record(self.index, top_k_index, top_k_weights)
        rows = send_out(hidden_states.to(engine.compute_dtype(self.index)), record.dispatch, engine.comms)
        record.copies.ensure_held()
        weights = _Materialize.run(engine, record.copies)
        rows = _run_parts(self.spec, rows, record, weights)
        if rows.requires_grad:
            # Runs before the backward of the experts, which reads their weights.
            rows.register_hook(lambda grad: engine.before_expert_gradients(record.copies))
        output = bring_back(rows, top_k_weights, record.dispatch, engine.comms).to(hidden_states.dtype)
        engine.after_layer(self.index, record)
        return output

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        kinds = ", ".join(f"{w.kind}{list(w.shape)}" for w in self.spec.weights)
        return f"num_experts={self.spec.num_experts}, {kinds}"


Weights = list[tuple[list[int], dict[str, Tensor]]]


def _run_parts(spec: ExpertsSpec, rows: Tensor, record: LayerRecord, weights: Weights) -> Tensor:
    """The expert MLP, once a stack of weights."""
    ends = [0, *accumulate(record.dispatch.sizes)]
    outputs = []
    for positions, part in weights:
        first, last = (positions[0], positions[-1] + 1) if positions else (0, 0)
        sizes = record.dispatch.sizes[first:last]
        outputs.append(spec.mlp(rows[ends[first] : ends[last]], Groups.of(sizes, rows.device), part))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class _Materialize(torch.autograd.Function):
    """Gives the weights of the experts held here to autograd, and sends their gradients home."""

    @staticmethod
    def run(engine: Engine, copies: LayerCopies) -> Weights:
        parts = copies.parts()
        flat = _Materialize.apply(engine.anchor, engine, copies, parts)
        tensors = iter(flat)
        return [(positions, {kind: next(tensors) for kind in weights}) for positions, weights in parts]

    @staticmethod
    def forward(ctx, anchor: Tensor, engine: Engine, copies: LayerCopies, parts: Weights):  # type: ignore[no-untyped-def]
        # The anchor requires a gradient, so that experts get theirs under a frozen trunk.
        ctx.engine, ctx.copies = engine, copies
        trainable = {w.kind for w in copies.layer.gradients.weights}
        ctx.kinds = [list(weights) for _, weights in parts]
        tensors = [w for _, weights in parts for w in weights.values()]
        frozen = [w for _, weights in parts for kind, w in weights.items() if kind not in trainable]
        ctx.mark_non_differentiable(*frozen)
        return tuple(tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def]
        rows: dict[str, list[Tensor]] = {w.kind: [] for w in ctx.copies.layer.gradients.weights}
        for kind, grad in zip((k for part in ctx.kinds for k in part), grads, strict=True):
            if kind in rows:
                rows[kind].extend(grad.unbind(0))
        ctx.engine.after_expert_gradients(ctx.copies, rows)
        return None, None, None, None
