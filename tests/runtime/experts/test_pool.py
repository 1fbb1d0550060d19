"""Gradients of pools: none where no pass came, on any mesh, as in the plain model; taken without a copy if possible."""

from __future__ import annotations

import pytest
import torch

import hecate
from tests.runtime.helpers import Pair, case, net, square_loss
from tests.workers import Groups


def _unreached_layer(meshes: tuple[tuple[int, ...], ...]) -> None:
    """The first step runs both layers, later steps only the first layer; the second layer's weights must not decay."""
    for mesh in meshes:
        for dense in ("fsdp", "replicate"):
            with case(f"{mesh}, {dense}"):
                pair = Pair(net((4, 4)), mesh, dense=dense, pools="layer")
                optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5))
                for step in range(3):
                    layers = 2 if step == 0 else 1
                    pair.backward(square_loss(step, layers=layers))
                    reached = [p.grad is not None for pool in pair.engine.pools for p in pool.parameters.values()]
                    assert reached == [True, True, layers == 2, layers == 2]
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                pair.check_state(rtol=1e-8)


def test_gradients_of_all_slots_are_taken_as_they_are() -> None:
    engine = hecate.fully_shard(net((4,)), config=hecate.FSSDPConfig(policy="ep"))
    (pool,) = engine.pools
    made = {kind: torch.randn_like(p) for kind, p in pool.parameters.items()}
    up, down = made
    storage = torch.randn(made[up].numel() + made[down].numel(), dtype=made[up].dtype)
    alike = {kind: part.view_as(made[kind]) for kind, part in zip(made, storage.split(made[up].numel()), strict=True)}
    for refused in (
        {up: made[up][:3], down: made[down]},  # not those of all slots
        {up: made[up].float(), down: made[down]},
        {up: made[up].mT.contiguous().mT, down: made[down]},
        alike,  # one of them could be changed through the other
    ):
        assert not pool.take_gradients(refused, 1.0)
        assert all(p.grad is None for p in pool.parameters.values())
    assert pool.take_gradients(made, 1.0)
    assert all(p.grad is made[kind] for kind, p in pool.parameters.items())
    assert not pool.take_gradients(made, 1.0)  # there are gradients now
    for parameter in pool.parameters.values():
        parameter.grad = None
    assert pool.take_gradients(made, 0.5)
    for kind, parameter in pool.parameters.items():
        torch.testing.assert_close(parameter.grad, made[kind] / 2)
    pool.parameters[up].grad = None
    pool.parameters[up].requires_grad_(False)
    assert not pool.take_gradients({up: made[up]}, 1.0)


def test_new_gradients_are_seen_when_they_are_whole() -> None:
    engine = hecate.fully_shard(net((4,)), config=hecate.FSSDPConfig(policy="ep"))
    (pool,) = engine.pools
    ones = {kind: torch.ones_like(p) for kind, p in pool.parameters.items()}
    made = pool.new_gradients(pool.parameters)
    assert made is not None
    pool.add_gradients(0, ones, 0.5, made, fresh=True)
    pool.add_gradients(1, {kind: rows[:2] for kind, rows in ones.items()}, 2.0, made)
    assert all(p.grad is None for p in pool.parameters.values())
    pool.adopt(made)
    for parameter in pool.parameters.values():
        assert parameter.grad is not None
        assert [row.unique().tolist() for row in parameter.grad] == [[0.5], [2.5], [2.5], [0.5]]
    assert pool.new_gradients(pool.parameters) is None  # there are gradients now


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_first_gradients_have_the_bits_of_a_sum_with_zeros(dtype: torch.dtype, scale: float) -> None:
    engine = hecate.fully_shard(net((4,)), config=hecate.FSSDPConfig(policy="ep"))
    (pool,) = engine.pools
    grads = {kind: torch.randn_like(p).to(dtype) for kind, p in pool.parameters.items()}
    written = {kind: torch.full_like(p, torch.nan) for kind, p in pool.parameters.items()}
    added = {kind: torch.zeros_like(p) for kind, p in pool.parameters.items()}
    pool.add_gradients(0, grads, scale, written, fresh=True)
    pool.add_gradients(0, grads, scale, added)
    for kind in grads:
        assert torch.equal(written[kind], added[kind])


def test_layer_that_no_pass_reaches(groups: Groups) -> None:
    groups(2).run(_unreached_layer, ((1, 2), (2, 1)))


def test_layer_that_no_pass_reaches_on_four_devices(groups: Groups) -> None:
    groups(4).run(_unreached_layer, ((2, 2),))
