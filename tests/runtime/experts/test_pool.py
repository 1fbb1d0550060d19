"""A parameter that no pass reached has no gradient, on any mesh, so optimizers skip it as in the plain model."""

from __future__ import annotations

import torch

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


def test_layer_that_no_pass_reaches(groups: Groups) -> None:
    groups(2).run(_unreached_layer, ((1, 2), (2, 1)))


def test_layer_that_no_pass_reaches_on_four_devices(groups: Groups) -> None:
    groups(4).run(_unreached_layer, ((2, 2),))
