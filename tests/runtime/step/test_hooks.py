"""Hooks on parameters: an optimizer in the backward pass trains as in the plain model; useless hooks are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hecate.values.local import local_tensor
from tests.runtime.helpers import Pair, case, close, error_of, gpt, lm_loss, rank
from tests.workers import Groups

TOKENS = 2 * 8 * 2  # tokens of one rank in one pass, times top-k
SHARDED: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "replicate": {"dense": "replicate", "pools": "layer"},
    "fsdp, a pool a layer, recomputed": {"pools": "layer", "rematerialize": True, "reshard_interval": 1},
}
MESHES: dict[str, dict[str, Any]] = {
    "2 x 2": {"mesh": (2, 2)},
    "2 x 2, a pool a layer": {"mesh": (2, 2), "pools": "layer", "reshard_interval": 1},
    "2 x 2, replicate": {"mesh": (2, 2), "dense": "replicate"},
}


def _step_in_backward(model: nn.Module) -> list[str]:
    """Make an SGD per parameter, which steps when the gradient is complete. Returns a list of the names of parameters
    that have stepped, which grows later.
    """
    stepped: list[str] = []
    for name, parameter in model.named_parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.05, momentum=0.9)

        def hook(_: Tensor, name: str = name, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()
            stepped.append(name)

        parameter.register_post_accumulate_grad_hook(hook)
    return stepped


def _optimizer_in_backward(cases: dict[str, dict[str, Any]]) -> None:
    for name, changes in cases.items():
        with case(name):
            pair = Pair(gpt(), **changes)
            stepped = _step_in_backward(pair.model)
            optimizer = torch.optim.SGD(pair.plain.parameters(), lr=0.05, momentum=0.9)
            for seed in range(3):
                stepped.clear()
                pair.backward(lm_loss(seed))
                assert sorted(stepped) == sorted(n for n, _ in pair.model.named_parameters())
                optimizer.step()
                optimizer.zero_grad()
            pair.check_state()
            lm_loss(3)(pair.model, rank())  # the third step has ended when the fourth begins
            assert pair.engine.stats()["step"] == 3
            shared = 2  # ranks per row of the mesh
            assert pair.engine.stats()["layers"][0]["loads"].sum() % (TOKENS * shared) == 0
            assert pair.engine.stats()["layers"][0]["loads"].sum() > 0
            assert any(layer["copies"] for layer in pair.engine.stats()["layers"])


def test_optimizer_in_backward(groups: Groups) -> None:
    groups(2).run(_optimizer_in_backward, SHARDED)


def test_optimizer_in_backward_on_a_mesh(groups: Groups) -> None:
    groups(4).run(_optimizer_in_backward, MESHES)


def _gradients_at_hook_time(dense: str) -> None:
    """Each hook sees the same gradient as after the backward pass, including that of earlier micro-batches."""
    pair = Pair(gpt(), dense=dense, pools="layer")
    pair.warm_up(lm_loss(9))
    seen: dict[str, Tensor] = {}

    def watch(name: str, parameter: nn.Parameter) -> None:
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            seen[name] = local_tensor(p.grad).clone()

        parameter.register_post_accumulate_grad_hook(hook)

    for name, parameter in pair.model.named_parameters():
        watch(name, parameter)
    for seed in range(2):
        pair.backward(lm_loss(seed))
        for name, parameter in pair.model.named_parameters():
            assert parameter.grad is not None
            close(f"gradient of {name} when its hook ran", seen[name], local_tensor(parameter.grad))
    pair.check_gradients()


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_gradients_are_complete_when_hooks_run(groups: Groups, dense: str) -> None:
    groups(2).run(_gradients_at_hook_time, dense)


def _hooks_on_gradients() -> list[str]:
    """Errors for a pool and for a replicated parameter; no error after the hook has been removed."""
    pair = Pair(gpt(), dense="replicate")
    errors = []
    for name in ("hecate_pool_0_up", "head.weight"):
        handle = pair.model.get_parameter(name).register_hook(lambda grad: grad)
        errors.append(error_of(lambda: lm_loss(0)(pair.model, rank())))
        handle.remove()
    pair.backward(lm_loss(0))
    pair.check_gradients()
    return errors


def test_register_hook_is_refused(groups: Groups) -> None:
    for of_pool, of_replica in groups(2).run(_hooks_on_gradients):
        assert "'up' of blocks.0.moe.experts has a hook from register_hook" in of_pool
        assert "head.weight has a hook from register_hook" in of_replica
        assert all("use register_post_accumulate_grad_hook" in error for error in (of_pool, of_replica))
