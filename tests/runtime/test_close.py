"""`close()` frees what an engine uses: process groups, threads, file descriptors, hooks."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import hecate
from hecate.models.gpt import GPTMoE
from tests.adapters.tiny import tiny_model
from tests.runtime.helpers import WIDTH, config
from tests.runtime.reference import TINY
from tests.workers import Groups

TOKENS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))


def _held() -> dict[str, int]:
    gc.collect()
    return {
        "threads": threading.active_count(),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "hooks": len(torch_optimizer._global_optimizer_post_hooks),
    }


class Stacked(nn.Module):
    """Experts whose computation is a method of the module, which knows the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, WIDTH)
        self.router = nn.Linear(WIDTH, 4)
        self.experts = hecate.stack_experts(nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids to a loss."""
        x = self.embedding(tokens.flatten())
        weights, index = self.router(x).softmax(-1).topk(2)
        loss: Tensor = self.experts(x, index, weights).square().mean()
        return loss


def _gpt() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return GPTMoE(TINY), lambda model: model(TOKENS[:, :-1], TOKENS[:, 1:]).loss


def _stacked() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return Stacked(), lambda model: model(TOKENS)


def _qwen() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return tiny_model("qwen3_moe"), lambda model: model(input_ids=TOKENS, labels=TOKENS).loss


MODELS = (_gpt, _stacked, _qwen)


def _used(how: str, path: str, number: int) -> None:
    model, loss = MODELS[number]()
    engine = hecate.fully_shard(model, None, config("balanced"))
    optimizer = torch.optim.AdamW(engine.model.parameters())
    for _ in range(2):
        loss(engine.model).backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.save(path, optimizer, async_op=True)
    if how == "close":
        engine.close()
        engine.close()
    elif how == "with":
        with engine:
            pass


def _many(how: str, path: str) -> tuple[dict[str, int], dict[str, int]]:
    for number in range(len(MODELS)):
        _used(how, path, number)
    before = _held()
    for number in (*range(len(MODELS)), *range(len(MODELS))):
        _used(how, path, number)
        gc.collect()
    hecate.fully_shard(GPTMoE(TINY)).close()  # takes what was left by garbage in other threads
    return before, _held()


@pytest.mark.parametrize("how", ["close", "with", "garbage"])
def test_nothing_is_left(groups: Groups, tmp_path_factory: pytest.TempPathFactory, how: str) -> None:
    for before, after in groups(2).run(_many, how, str(tmp_path_factory.mktemp(how) / "saved")):
        for what, number in after.items():
            assert number <= before[what] + (4 if what == "descriptors" else 0), what


def test_further_use_is_refused() -> None:
    with hecate.fully_shard(GPTMoE(TINY)) as engine:
        engine.model(TOKENS[:, :-1], TOKENS[:, 1:])
    with pytest.raises(RuntimeError, match=r"close\(\) was called"):
        engine.model(TOKENS[:, :-1], TOKENS[:, 1:])
    for use in (engine.full_state_dict, lambda: engine.save("nowhere")):
        with pytest.raises(RuntimeError, match=r"close\(\) was called"):
            use()


def _groups_gone() -> None:
    engine = hecate.fully_shard(GPTMoE(TINY))
    comms = engine._comms
    for group in (comms.tokens, comms.experts.group, comms.reductions.group):  # type: ignore[union-attr]
        dist.destroy_process_group(group)
    del group
    gc.collect()
    engine.close()


def test_close_after_the_groups_were_destroyed(groups: Groups) -> None:
    groups(2).run(_groups_gone)
