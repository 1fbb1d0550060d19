"""`close()` frees what an engine uses: process groups, threads, file descriptors, hooks."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch
import torch.distributed as dist
from torch.optim import optimizer as torch_optimizer

import hecate
from hecate.models.gpt import GPTMoE
from tests.runtime.helpers import config
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


def _used(how: str, path: str) -> None:
    engine = hecate.fully_shard(GPTMoE(TINY), None, config("balanced"))
    optimizer = torch.optim.AdamW(engine.model.parameters())
    for _ in range(2):
        engine.model(TOKENS[:, :-1], TOKENS[:, 1:]).loss.backward()
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
    _used(how, path)
    before = _held()
    for _ in range(4):
        _used(how, path)
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
