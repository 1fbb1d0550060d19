"""Uses of autograd graphs (`inputs=`, `autograd.grad`, gradients of gradients) are right, or refused with an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hecate.runtime.tokens.by_node import NodeDispatch, _SumOf, _Take, _WeightedSum
from hecate.runtime.tokens.direct import DirectDispatch
from hecate.runtime.tokens.halves import HalvedDispatch
from tests.runtime.helpers import (
    Net,
    Pair,
    case,
    close,
    devices_per_node,
    error_of,
    floats,
    gpt,
    lm_loss,
    net,
    rank,
    square_loss,
    world,
)
from tests.workers import Groups

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"rematerialize": True},
    {"dense": "replicate"},
    {"dense": "replicate", "rematerialize": True, "pools": "layer"},
)


def _named(model: nn.Module, wanted: Callable[[str], bool]) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if wanted(name.replace("hecate_pool_0_", ".experts."))]


def _inputs(dense: str) -> None:
    """`backward(inputs=...)` gives a gradient to these inputs only; a second call adds those of the others.

    Only experts are used as inputs: under FSDP2 and with replicas, the dense part has other parameters during a pass
    than between passes.
    """
    choices: dict[str, Callable[[str], bool]] = {
        "experts": lambda name: ".experts." in name,
        "one kind": lambda name: name.endswith(".up"),
    }
    for name, wanted in choices.items():
        for rematerialize in (False, True):
            with case(f"{name}, {rematerialize=}"):
                pair = Pair(gpt(), dense=dense, rematerialize=rematerialize)
                pair.warm_up(lm_loss(9))
                lm_loss(0)(pair.model, rank()).backward(inputs=_named(pair.model, wanted))
                for of in range(world()):
                    (lm_loss(0)(pair.plain, of) / world()).backward(inputs=_named(pair.plain, wanted))
                pair.check_gradients()
                assert all(p.grad is None for p in _named(pair.model, lambda n, wanted=wanted: not wanted(n)))
                pair.backward(lm_loss(1))
                pair.check_gradients()


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_backward_of_chosen_experts(groups: Groups, dense: str) -> None:
    groups(2).run(_inputs, dense)


def _inputs_without_experts() -> None:
    """Only an input of the model gets a gradient."""
    for changes in SETTINGS:
        with case(changes):
            pair = Pair(net(), **changes)
            pair.warm_up(square_loss(9))
            inputs = [floats(0, rank()).requires_grad_() for _ in pair.both]
            for model, x in zip(pair.both, inputs, strict=True):
                model(x).square().mean().backward(inputs=[x])
                assert all(p.grad is None for p in model.parameters())
            close("gradient of the input", inputs[0].grad, inputs[1].grad)
            pair.backward(square_loss(1))
            pair.check_gradients()


def test_backward_of_an_input_alone(groups: Groups) -> None:
    groups(2).run(_inputs_without_experts)


def _saliency() -> None:
    """`autograd.grad` with respect to an activation, then the backward pass of the same graph."""
    for changes in SETTINGS:
        with case(changes):
            pair = Pair(gpt(), **changes)
            pair.warm_up(lm_loss(9))
            activations: list[Tensor] = []
            for model in pair.both:
                model.blocks[0].register_forward_hook(lambda *given, kept=activations: kept.append(given[-1][0]))
            loss = lm_loss(0)(pair.model, rank())
            (gradient,) = torch.autograd.grad(loss, activations[-1], retain_graph=True)
            loss.backward()
            (expected,) = torch.autograd.grad(lm_loss(0)(pair.plain, rank()), activations[-1])
            close("gradient of the activation", gradient, expected)
            pair.backward_plain(lm_loss(0))
            pair.check_gradients()


def test_gradient_of_an_activation(groups: Groups) -> None:
    groups(2).run(_saliency)


def _gradients_of_experts() -> list[str]:
    """Two errors: of `autograd.grad` for expert parameters, and of differentiating their gradients again."""
    errors = []
    for act in (
        lambda loss, pair: torch.autograd.grad(loss, _named(pair.model, lambda name: ".experts." in name)),
        lambda loss, pair: loss.backward(create_graph=True),
    ):
        pair = Pair(net(), dense="replicate")
        loss = square_loss(0)(pair.model, rank())
        errors.append(error_of(lambda act=act, loss=loss, pair=pair: act(loss, pair)))
        assert all(p.grad is None for pool in pair.engine.pools for p in pool.parameters.values())
        pair.engine.skip_step()
        pair.backward(square_loss(1))
        pair.check_gradients()
    return errors


def test_autograd_grad_of_experts_is_refused(groups: Groups) -> None:
    for returned, differentiated in groups(2).run(_gradients_of_experts):
        assert returned.startswith("RuntimeError: moes.1.experts: torch.autograd.grad cannot return")
        assert "moes.1.experts: create_graph=True, but gradients of experts cannot be differentiated" in differentiated


class _Checkpointed(Net):
    """Recomputes each MoE layer in backward."""

    def forward(self, x: Tensor, layers: int | None = None) -> Tensor:
        x = self.first(x)
        for moe in self.moes[:layers]:
            x = x + checkpoint(moe, x, use_reentrant=False)[0]
        return self.head(x)


def _penalty(model: nn.Module, of: int) -> Tensor:
    """The gradient penalty of WGAN-GP: mean of (norm of d output / d input - 1) squared."""
    x = floats(1, of).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def _with_loss(model: nn.Module, of: int) -> Tensor:
    return _penalty(model, of) + square_loss(1)(model, of)


def _double(checkpointed: bool, way: type) -> None:
    torch.manual_seed(0)
    with devices_per_node(1):
        model = (_Checkpointed if checkpointed else Net)((4, 4, 3)).double()
        pair = Pair(model, dense="replicate", token_halves=way is HalvedDispatch)
    passes, ways = pair.engine._engine.passes, set()
    pair.model.register_forward_hook(
        lambda *_: ways.update(type(record.dispatch) for record in passes._current.records.values())
    )
    with patch("hecate.runtime.tokens.dispatch.node_exchange_pays", lambda *_: way is NodeDispatch):
        pair.warm_up(square_loss(9))
        for loss in (_penalty, _with_loss):
            pair.backward(loss)
            pair.check_gradients()
    assert ways == {way}
    assert all(p.grad.any() for pool in pair.engine.pools for p in pool.parameters.values())
    assert sum(layer["copies"] for layer in pair.engine.stats()["layers"]) > 0


def _penalties() -> None:
    for checkpointed in (False, True):
        for way in (DirectDispatch, HalvedDispatch, NodeDispatch):
            with case(f"{checkpointed=}, {way=}"):
                _double(checkpointed, way)


@pytest.mark.parametrize("devices", [2, 3])
def test_gradient_penalty(groups: Groups, devices: int) -> None:
    groups(devices).run(_penalties)


def _refused_penalties() -> list[str]:
    errors = []
    for changes in ({"dense": "replicate", "rematerialize": True}, {"dense": "fsdp"}):
        pair = Pair(net(), **changes)
        pair.warm_up(square_loss(9))
        errors.append(error_of(lambda pair=pair: _penalty(pair.model, rank())))
        assert all(p.grad is None for p in pair.model.parameters())
        pair.engine.skip_step()
        pair.backward(square_loss(1))
        pair.check_gradients()
    return errors


def test_gradient_penalty_is_refused_where_weights_do_not_stay(groups: Groups) -> None:
    for recomputed, sharded in groups(2).run(_refused_penalties):
        assert "create_graph=True: rematerialize=True writes other layers' experts over those" in recomputed
        assert "create_graph=True: dense='fsdp' frees those" in sharded


def test_steps_of_the_node_exchange_are_differentiable_twice() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    # Three rows; the first is sent twice, the second once, the third not at all.
    index, slots = torch.tensor([0, 1, 0]), torch.tensor([[0, 2], [1, 3], [3, 3]])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda rows: _Take.apply(rows, index, slots), (draw(3, 2),))
        assert check(lambda rows: _SumOf.apply(rows, index, slots), (draw(3, 2),))
        assert check(lambda rows, weights: _WeightedSum.apply(rows, weights, index, slots), (draw(3, 2), draw(3, 2)))


def _sent_tensors() -> None:
    """A backend's thread may hold what is sent longer than the caller; it must not hold the graph with it."""
    sent, exchange = [], dist.all_to_all_single

    def remember(out: Tensor, rows: Tensor, *args: Any, **options: Any) -> Any:
        sent.extend((out, rows))
        return exchange(out, rows, *args, **options)

    for changes in ({}, {"kernels": "hecate"}):
        pair = Pair(gpt().float(), **changes)
        with patch.object(dist, "all_to_all_single", remember):
            loss = lm_loss(1)(pair.model, rank())
        assert loss.requires_grad
        assert sent
        assert all(tensor.grad_fn is None for tensor in sent)


def test_no_collective_holds_the_graph(groups: Groups) -> None:
    groups(2).run(_sent_tensors)
