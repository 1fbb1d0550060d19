"""Layers with different numbers of experts train as the plain model, whether they share pools or each has its own."""

from __future__ import annotations

import numpy as np
import torch

from tests.runtime.helpers import Pair, case, net, square_loss, world
from tests.workers import Groups

EXPERTS = {2: ((4, 3, 4, 3), (2, 5, 4, 3), (3, 3, 3)), 3: ((2, 5, 4), (4, 4)), 4: ((3, 2, 3), (2, 2, 7))}


def _train(experts: tuple[int, ...], pools: str) -> None:
    pair = Pair(net(experts), pools=pools, reshard_interval=1)
    for pool in pair.engine.pools:
        owned = np.bincount(np.concatenate(pool.owners), minlength=world())
        assert owned.max() - owned.min() <= 1
        assert owned.max() <= pool.slots
    optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2))
    for seed in range(3):
        pair.backward(square_loss(seed))
        pair.check_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pair.check_state(rtol=1e-8)
    layers = pair.engine.stats()["layers"]
    assert [layer["loads"].shape for layer in layers] == [(e,) for e in experts]
    assert [layer["loads"].sum() for layer in layers] == [6 * 2 * world()] * len(experts)


def _all(cases: tuple[tuple[int, ...], ...]) -> None:
    for experts in cases:
        for pools in ("shared", "layer"):
            with case(f"{experts}, {pools}"):
                _train(experts, pools)


def test_two_devices(groups: Groups) -> None:
    groups(2).run(_all, EXPERTS[2])


def test_three_devices(groups: Groups) -> None:
    groups(3).run(_all, EXPERTS[3])


def test_four_devices(groups: Groups) -> None:
    groups(4).run(_all, EXPERTS[4])
