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
    """An experts module under FSSDP: its stacked weights live in the engine's pool, all else it has stays in it."""

    @staticmethod
    def take_over(module: nn.Module, engine: Engine, index: int, spec: ExpertsSpec) -> None:
        """Turn `module` into this in place, as FSDP2's `fully_shard` does: by a subclass of both classes.

        So it keeps its name, submodules and attributes, and frees the weights that the pool has copied.
        """
        for weight in spec.weights:
            delattr(module, weight.kind)
        cls = type(module)
        module.__class__ = type(f"FSSDP{cls.__name__}", (FSSDPExperts, cls), {})
        assert isinstance(module, FSSDPExperts)
        # In a list, so that nn.Module does not take it for a submodule; the engine holds the model.
        module._hecate_engine = [engine]
        module.hecate_index = index
        module.hecate_spec = spec

    _hecate_engine: list[Engine]
    hecate_index: int
    hecate_spec: ExpertsSpec

    # Its collectives depend on counts that only the host knows: torch.compile breaks its graph here.
    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted outputs of each token's experts.

        Args:
            hidden_states: `[T, d]`.
            top_k_index: int64 `[T, k]`.
            top_k_weights: `[T, k]`.

        Returns:
            `[T, d]` in the dtype of `hidden_states`; experts compute in `param_dtype`, under autocast too.

        Raises:
            ValueError: under autocast with float16.
        """
        engine = self._hecate_engine[0]
        _check_autocast(self.hecate_spec.name, hidden_states.device.type)
        with engine.comms.guard():
            return _run(engine, self.hecate_index, self.hecate_spec, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        spec = self.hecate_spec
        return f"num_experts={spec.num_experts}, {', '.join(f'{w.kind}{list(w.shape)}' for w in spec.weights)}"


Weights = list[tuple[list[int], dict[str, Tensor]]]


def _check_autocast(layer: str, kind: str) -> None:
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        raise ValueError(
            f"{layer}: autocast with torch.float16 needs a loss scaler that knows of all ranks; use torch.bfloat16"
        )


def _run(
    engine: Engine, index: int, spec: ExpertsSpec, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One layer for one micro-batch; see `FSSDPExperts.forward`."""
    record = engine.record(index, top_k_index, top_k_weights)
    rows = send_out(hidden_states.to(engine.compute_dtype(index)), record.dispatch, engine.comms)
    record.copies.ensure_held()
    weights = _Materialize.run(engine, record.copies)
    rows = _run_parts(spec, rows, record, weights)
    if rows.requires_grad:
        # Runs before the backward of the experts, which reads their weights.
        rows.register_hook(lambda grad: engine.before_expert_gradients(record.copies))
    output = bring_back(rows, top_k_weights, record.dispatch, engine.comms).to(hidden_states.dtype)
    engine.after_layer(index, record)
    return output


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
