"""Dense weights gathered ahead for a block that then does not run are not used after the optimizer has changed them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.runtime.helpers import Pair, case, floats, net
from tests.workers import Groups


def _left_early(model: nn.Module, of: int) -> Tensor:
    return model(floats(0, of), 1).square().mean()


def _whole(model: nn.Module, of: int) -> Tensor:
    return model(floats(1, of)).square().mean()


def _early_exits() -> None:
    for evaluate in (False, True):
        with case(f"early exit in a pass {'without' if evaluate else 'with'} gradients"):
            pair = Pair(net((4, 4, 4)), dense="fsdp")
            optimizers = pair.optimizers(lambda p: torch.optim.SGD(p, lr=1e-3))
            for loss_of in (_whole, _whole, _left_early, _whole):
                pair.backward(loss_of)
                pair.check_gradients()
                if evaluate:  # FSDP2 itself drops what was gathered in vain when a backward pass ends
                    with torch.no_grad():
                        pair.model(floats(0, 0), 1)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()


def test_early_exits(groups: Groups) -> None:
    groups(2).run(_early_exits)


def _ahead() -> list[int]:
    pair = Pair(net((4, 4, 4)), dense="fsdp")
    held = []
    first, second, third = pair.model.moes
    second.gate.register_forward_pre_hook(lambda *_: held.append(third._get_fsdp_state()._fsdp_param_group))
    first.gate.register_forward_pre_hook(lambda *_: held.append(second._get_fsdp_state()._fsdp_param_group))
    gathering = []
    for module in (first, second):
        module.gate.register_forward_pre_hook(lambda *_: gathering.append(held[-1]._all_gather_result is not None))
    pair.model(floats(0, 0))
    return gathering


def test_the_next_block_is_gathered_ahead(groups: Groups) -> None:
    assert groups(2).run(_ahead) == [[True, True]] * 2
