"""Forward and backward of one MoE layer under FSSDP: from the router's choice to the combined output.

Shapes: T tokens of this device, k experts per token, N rows that this device computes, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.experts import ExpertsSpec
from hecate.labels import label
from hecate.ops.grouped import Groups
from hecate.ops.linear import Begun
from hecate.private_torch import accumulates
from hecate.runtime.experts.copies import LayerCopies
from hecate.runtime.step.passes import Passes
from hecate.runtime.step.record import LayerRecord
from hecate.runtime.tokens.exchange import Dispatch
from hecate.runtime.tokens.halves import HalvedDispatch

__all__ = ["run"]

Weights = list[tuple[list[int], dict[str, Tensor]]]


def run(
    passes: Passes, index: int, spec: ExpertsSpec, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One layer for one micro-batch. Collective. Arguments and result are those of `FSSDPExperts.forward`, checked.

    Args:
        passes: the model's passes.
        index: index of the layer.
        spec: what an adapter found in the layer.
        hidden_states: `[T, d]`.
        top_k_index: int64 `[T, k]`, contiguous.
        top_k_weights: `[T, k]`, contiguous.
    """
    record = passes.record(index, top_k_index, top_k_weights)
    layer = _Layer(passes, spec, record, hidden_states, top_k_weights)
    beside = passes.beside_tokens(index, hidden_states)
    if isinstance(record.dispatch, HalvedDispatch):
        output = _halves(layer, record.dispatch, beside)
    else:
        output = _whole(layer, record.dispatch, beside)
    passes.after_layer(index, record)
    return output


@dataclass(frozen=True, eq=False)
class _Layer:
    """One call of a layer.

    Attributes:
        passes: the model's passes.
        spec: what an adapter found in the layer.
        record: the plan.
        hidden: `[T, d]`.
        weights: `[T, k]` router weights.
    """

    passes: Passes
    spec: ExpertsSpec
    record: LayerRecord
    hidden: Tensor
    weights: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """In which the experts compute."""
        return self.record.copies.layer.dtypes.param

    def compute(self, dispatch: Dispatch, rows: Tensor, experts: Weights) -> Tensor:
        """Results of the rows `[N, d]` that arrived by `dispatch`."""
        with label("experts", self.spec.name):
            rows = _experts(self, dispatch, rows, experts)
        if rows.requires_grad:
            rows.register_hook(_GatherForBackward(self.passes, self.record.copies))
        return rows


def _whole(layer: _Layer, dispatch: Dispatch, beside: Callable[[], None] | None) -> Tensor:
    copies, name = layer.record.copies, layer.spec.name
    with label("dispatch", name):
        rows = dispatch.dispatch(layer.hidden, layer.dtype, copies.add_own_gradients, beside)
    copies.ensure_held()
    rows = layer.compute(dispatch, rows, _ExpertWeights.of(layer.passes, copies))
    with label("combine", name):
        return dispatch.combine(rows, layer.record.weights(layer.weights), layer.hidden.dtype)


def _halves(layer: _Layer, dispatch: HalvedDispatch, beside: Callable[[], None] | None) -> Tensor:
    """Each half travels while experts compute the other. Backward is the reverse, node by node of the graph.

    The weights' node is made after the first half has arrived: then their gradients, which need both halves, are sent
    before the first half's rows leave, and the owners' are added while those travel.
    """
    copies, name, back = layer.record.copies, layer.spec.name, list[Begun]()
    with label("dispatch", name):
        there = dispatch.begin(layer.hidden, layer.dtype, copies.add_own_gradients)
    try:
        if beside is not None:
            beside()
        copies.ensure_held()
        experts: Weights | None = None
        for half, begun in zip(dispatch.halves, there, strict=True):
            with label("dispatch", name):
                rows = begun.end()
            experts = _ExpertWeights.of(layer.passes, copies) if experts is None else experts
            rows = layer.compute(half, rows, experts)
            with label("combine", name):
                back.append(dispatch.begin_return(half, rows))
    except BaseException:
        for begun in (*there, *back):
            begun.abandon()
        raise
    with label("combine", name):
        home = [begun.end() for begun in back]
        return dispatch.add_up(home, layer.record.weights(layer.weights), layer.hidden.dtype)


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


def _experts(layer: _Layer, dispatch: Dispatch, rows: Tensor, weights: Weights) -> Tensor:
    """The expert MLP on rows by expert, once per stack of weights."""
    spec, gemm, kernels = layer.spec, layer.passes.gemm, layer.record.copies.layer.kernels
    if dispatch.ends is not None:
        ((_, part),) = weights  # `Setup` has seen to it
        return spec.mlp(rows, Groups(None, dispatch.ends, kernels, gemm), part)
    bounds = [(positions[0], positions[-1] + 1) if positions else (0, 0) for positions, _ in weights]
    sizes = [dispatch.sizes[first:last] for first, last in bounds]
    outputs = []
    # Slices would fill their gradients with zeros to the shape of `rows` and add them up; a split concatenates them.
    for own, of_experts, (_, part) in zip(_split(rows, [sum(s) for s in sizes]), sizes, weights, strict=True):
        outputs.append(spec.mlp(own, Groups.of(of_experts, rows.device, kernels, gemm), part))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _split(rows: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    # Unlike `split` it lets an expert change its own rows in place, which are nobody else's.
    return torch.unsafe_split_with_sizes(rows, sizes) if len(sizes) > 1 else (rows,)


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
