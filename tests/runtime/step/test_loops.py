"""Models that call an MoE layer several times in one forward pass train as in one process, and loads are added up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.runtime.helpers import Net, Pair, case, error_of, floats, rank, world
from tests.workers import Groups

TOKENS = 6 * 2  # tokens of one rank in one call, times top-k
SETTINGS: tuple[dict[str, Any], ...] = (
    {"reshard_interval": 1},
    {"rematerialize": True, "reshard_interval": 1},
    {"dense": "replicate"},
    {"dense": "replicate", "rematerialize": True, "pools": "layer"},
)
Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def _plainly(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return part(x)


WAYS: dict[str, tuple[Run, Run]] = {
    "no checkpoint": (_plainly, _plainly),
    "each call": (_plainly, partial(checkpoint, use_reentrant=False)),
    "each call, reentrant": (_plainly, partial(checkpoint, use_reentrant=True)),
    "each round": (partial(checkpoint, use_reentrant=False), _plainly),
    "each round, reentrant": (partial(checkpoint, use_reentrant=True), _plainly),
    "each round and each call": (partial(checkpoint, use_reentrant=False), partial(checkpoint, use_reentrant=False)),
    "first round without gradients": (_plainly, _plainly),
}


class Looped(Net):
    """`rounds` times through all layers, the second of them twice in a row (as in a Chain-of-Experts)."""

    def __init__(self, way: str) -> None:
        super().__init__((4, 3, 5))
        self._round_by, self._call_by = WAYS[way]
        self._rounds_without_gradients = int(way.startswith("first round"))

    def forward(self, x: Tensor, rounds: int = 2) -> Tensor:
        x = self.first(x)
        for number in range(rounds):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= self._rounds_without_gradients):
                x = self._round_by(partial(self._round, number), x)
        return self.head(x)

    def _round(self, number: int, x: Tensor) -> Tensor:
        for moe in (self.moes[0], self.moes[1], self.moes[1], self.moes[2])[: 4 - number]:
            x = x + self._call_by(partial(self._called, moe), x)
        return x

    @staticmethod
    def _called(moe: nn.Module, x: Tensor) -> Tensor:
        return moe(x / x.norm(dim=-1, keepdim=True))[0]


CALLS = (2, 4, 1)


def _looped(way: str) -> nn.Module:
    torch.manual_seed(0)
    return Looped(way).double()


def _loss(seed: int, **kwargs: Any) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, of: model(floats(seed, of), **kwargs).square().mean()


def _train(pair: Pair) -> None:
    optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0))
    for seed in range(2):
        with torch.no_grad():
            expected = pair.plain(floats(seed, rank()))
            torch.testing.assert_close(pair.model(floats(seed, rank())), expected, rtol=1e-9, atol=1e-12)
        pair.backward(_loss(seed))
        pair.backward(_loss(seed + 10))
        pair.check_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loads = [int(layer["loads"].sum()) for layer in pair.engine.stats()["layers"]]
        assert loads == [2 * TOKENS * calls * world() for calls in CALLS]
    pair.check_state(rtol=1e-8)
    assert any(layer["copies"] for layer in pair.engine.stats()["layers"])


def _in_all_settings(ways: tuple[str, ...]) -> None:
    for way in ways:
        for changes in SETTINGS:
            with case(f"{way}, {changes}"):
                pair = Pair(_looped(way), **changes)
                if "reentrant" in way and "dense" not in changes:
                    assert "use_reentrant=True, of which FSDP2 loses gradients" in error_of(partial(_train, pair))
                else:
                    _train(pair)


def test_loops(groups: Groups) -> None:
    groups(2).run(_in_all_settings, tuple(WAYS))


def test_loops_on_three_devices(groups: Groups) -> None:
    groups(3).run(_in_all_settings, ("no checkpoint",))


def _retained() -> None:
    """Two backward passes through one graph, and a second graph in flight."""
    for way in ("no checkpoint", "each call", "each round"):
        for changes in SETTINGS[1:3]:
            with case(f"{way}, {changes}"):
                pair = Pair(_looped(way), **changes)
                pair.warm_up(_loss(9))
                for of, model, share in [(rank(), pair.model, 1.0)] + [(r, pair.plain, 1 / world()) for r in (0, 1)]:
                    one, two = _loss(0)(model, of), _loss(1)(model, of)
                    (one * share).backward(retain_graph=True)
                    (two * share).backward()
                    (one * share).backward()
                pair.check_gradients()


def test_retained_graphs_and_passes_in_flight(groups: Groups) -> None:
    groups(2).run(_retained)


def _one_materialization() -> int:
    """Bytes sent for the copies and gradients of one step; all calls of a pass read the same copies."""
    pair = Pair(_looped("no checkpoint"), calibrate=False)
    pair.warm_up(_loss(9))
    transport = pair.engine._comms.experts
    assert transport is not None
    gathers: list[object] = []
    gather = transport.gather
    transport.gather = lambda *args: (gathers.append(args), gather(*args))[1]  # type: ignore[method-assign]
    _loss(0)(pair.model, rank()).backward()
    copied = [layer for layer in pair.engine._engine.layers if layer.totals.last.copies]  # type: ignore[union-attr]
    assert len(gathers) == len(copied) > 0
    return len(gathers)


def test_copies_are_gathered_once_for_all_calls(groups: Groups) -> None:
    groups(2).run(_one_materialization)


def _unequal(rounds: tuple[int, ...]) -> str:
    pair = Pair(_looped("no checkpoint"), dense="replicate")
    error = error_of(lambda: [pair.model(floats(0, rank()), rounds=number) for number in (rounds[rank()], 2)])
    pair.engine.skip_step()
    pair.backward(_loss(2))
    pair.check_gradients()
    return error


def test_ranks_that_loop_unequally_are_told(groups: Groups) -> None:
    for error in groups(2).run(_unequal, (2, 3)):
        assert "the pass is MoE layer 0 with gradients" in error, error
        assert "and call 3 of MoE layer 0 with gradients" in error, error
