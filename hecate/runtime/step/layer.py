"""Forward and backward of one MoE layer under FSSDP: from the router's choice to the combined output.

Shapes: T tokens of this device, k experts per token, N rows that this device computes, d model width.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from hecate.experts import ExpertsSpec
from hecate.labels import label
from hecate.ops.grouped import Groups
from hecate.private_torch import accumulates
from hecate.runtime.experts.copies import LayerCopies
from hecate.runtime.experts.module import ExpertsModule, WeightModule
from hecate.runtime.step.engine import Engine
from hecate.runtime.step.passes import Passes
from hecate.runtime.step.record import LayerRecord

__all__ = ["FSSDPExperts"]


class FSSDPExperts(ExpertsModule):
    """An experts module under FSSDP. Its stacked weights are in the engine's pool; all else stays in the module."""

    @staticmethod
    def take_over(module: nn.Module, index: int, spec: ExpertsSpec) -> FSSDPExperts:
        """Change the class of `module`, and of modules with other weights of its experts; see `ExpertsModule.take`."""
        kinds = {name: name for name, _ in module.named_parameters(recurse=False)}  # in the order of the state dict
        for kind, place in spec.elsewhere.items():
            WeightModule.take(place.module, index, spec, {place.attribute: kind})
        return FSSDPExperts.take(module, index, spec, kinds)

    def connect(self, engine: Engine) -> None:
        """Set the engine that `forward` uses, and the experts that state dicts are made from."""
        experts = engine.layers[self.hecate_index].experts
        self.keep(experts)
        for place in self.hecate_spec.elsewhere.values():
            assert isinstance(place.module, WeightModule)
            place.module.keep(experts)
        # In a list, so that nn.Module does not look into it: the engine refers to the model.
        self._hecate_engine = [engine]

    def disconnect(self) -> None:
        """Let go of the engine; `forward` raises from now on."""
        self._hecate_engine = []

    _hecate_engine: list[Engine]

    # The sizes of collectives depend on token counts that the host must read, so torch.compile breaks its graph here.
    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted outputs of each token's experts.

        Args:
            hidden_states: `[T, d]`.
            top_k_index: integers `[T, k]`, the experts of each token; -1: none, so a token may have any number up to
                k.
            top_k_weights: `[T, k]`, their weights.

        Returns:
            `[T, d]` in the dtype of `hidden_states`. Experts compute in `param_dtype`, even under autocast.

        Raises:
            ValueError: under autocast with float16, or tensors of other shapes or kinds than these.
            RuntimeError: `FSSDP.close` was called.
        """
        if not self._hecate_engine:
            raise RuntimeError(f"{self.hecate_spec.name}: FSSDP.close() was called; the model cannot run any more")
        engine = self._hecate_engine[0]
        _check_autocast(self.hecate_spec.name, hidden_states.device.type)
        _check_shapes(self.hecate_spec.name, hidden_states, top_k_index, top_k_weights)
        chosen = (top_k_index.long().contiguous(), top_k_weights.contiguous())
        with engine.comms.guard():
            return _run(engine, self.hecate_index, self.hecate_spec, hidden_states, *chosen)

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


def _check_shapes(layer: str, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    if hidden.ndim != 2 or index.ndim != 2 or len(hidden) != len(index) or not index.shape[1]:
        raise ValueError(
            f"{layer} was called with hidden_states {list(hidden.shape)} and top_k_index {list(index.shape)}; must be "
            "[tokens, width] and [tokens, k], k > 0"
        )
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{layer}: top_k_index is {index.dtype}; must be the integer ids of experts")
    if index.shape != weights.shape:
        raise ValueError(
            f"{layer}: the router gave top_k_index {list(index.shape)} and top_k_weights {list(weights.shape)}; must "
            "both be [tokens, k] (hunyuan_v1_moe's in transformers 5.0 gives a weight per expert: use a newer version)"
        )


def _run(
    engine: Engine, index: int, spec: ExpertsSpec, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One layer for one micro-batch; see `FSSDPExperts.forward`."""
    passes, dtype = engine.passes, engine.layers[index].experts.dtypes.param
    record = passes.record(index, top_k_index, top_k_weights)
    with label("dispatch", spec.name):
        beside = passes.beside_tokens(index, hidden_states)
        rows = record.dispatch.dispatch(hidden_states, dtype, record.copies.add_own_gradients, beside)
    record.copies.ensure_held()
    with label("experts", spec.name):
        rows = _run_parts(spec, rows, record, _ExpertWeights.of(passes, record.copies), passes)
    if rows.requires_grad:
        rows.register_hook(_GatherForBackward(passes, record.copies))
    with label("combine", spec.name):
        output = record.dispatch.combine(rows, record.weights(top_k_weights), hidden_states.dtype)
    passes.after_layer(index, record)
    return output


class _GatherForBackward:
    """Gradient hook on a layer's output rows: makes sure that the experts' weights are here before their backward.

    This is an object because a function that registers itself again would be part of a reference cycle, and the graph
    would live until the garbage collector runs.
    """

    def __init__(self, passes: Passes, copies: LayerCopies) -> None:
        self._passes = passes
        self._copies = copies
        self._token = passes.token()

    def __call__(self, gradient: Tensor) -> None:
        self._passes.before_expert_gradients(self._copies, self._token)
        if gradient.requires_grad:  # create_graph=True: the second backward pass reads the same weights
            gradient.register_hook(self)


def _run_parts(spec: ExpertsSpec, rows: Tensor, record: LayerRecord, weights: Weights, passes: Passes) -> Tensor:
    """The expert MLP, once per stack of weights."""
    if record.dispatch.ends is not None:
        ((_, part),) = weights  # `Setup` has seen to it
        return spec.mlp(rows, Groups(None, record.dispatch.ends, record.copies.layer.kernels, passes.gemm), part)
    ends = [0, *accumulate(record.dispatch.sizes)]
    outputs = []
    for positions, part in weights:
        first, last = (positions[0], positions[-1] + 1) if positions else (0, 0)
        sizes = record.dispatch.sizes[first:last]
        groups = Groups.of(sizes, rows.device, record.copies.layer.kernels, passes.gemm)
        # The gradient of a slice is written into zeros of the shape of `rows`, so a slice of all rows is left out.
        own = rows if len(weights) == 1 else rows[ends[first] : ends[last]]
        outputs.append(spec.mlp(own, groups, part))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class _ExpertWeights(torch.autograd.Function):
    """Makes the weights of the experts held here part of the autograd graph, and reduces their gradients to the owners.

    The pool's parameters are inputs, so that autograd knows which weights are trained, even if the rest of the model is
    frozen, `requires_grad` was changed, or `backward(inputs=...)` is used. They get no gradient through autograd.
    """

    @staticmethod
    def of(passes: Passes, copies: LayerCopies) -> Weights:
        parts = copies.parts()
        parameters = copies.layer.pool.parameters
        tensors = iter(_ExpertWeights.apply(passes, copies, parts, tuple(parameters), *parameters.values()))
        return [(positions, {kind: next(tensors) for kind in weights}) for positions, weights in parts]

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, passes: Passes, copies: LayerCopies, parts: Weights, kinds: tuple[str, ...], *parameters: Tensor
    ):
        ctx.passes, ctx.copies, ctx.kinds = passes, copies, kinds
        ctx.stacks = [kind for _, weights in parts for kind in weights]
        trained = {kind for kind, parameter in zip(kinds, parameters, strict=True) if parameter.requires_grad}
        tensors = [(kind, w) for _, weights in parts for kind, w in weights.items()]
        ctx.mark_non_differentiable(*(w for kind, w in tensors if kind not in trained))
        return tuple(w for _, w in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def]
        name = ctx.copies.layer.name
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name}: create_graph=True, but gradients of experts cannot be differentiated again")
        nodes = (node for node, _ in ctx.next_functions[-len(ctx.kinds) :])
        wanted = {kind for kind, node in zip(ctx.kinds, nodes, strict=True) if node and accumulates(node, name)}
        stacks: dict[str, list[Tensor]] = {kind: [] for kind in ctx.kinds if kind in wanted}
        for kind, grad in zip(ctx.stacks, grads, strict=True):
            if kind in stacks:
                stacks[kind].append(grad)
        if stacks:
            ctx.passes.after_expert_gradients(ctx.copies, stacks)
        return (None,) * (4 + len(ctx.kinds))
