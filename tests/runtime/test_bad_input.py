"""Bad input raises an error on every rank instead of a hang; the error names the setting, both values and the rule."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import hecate
from hecate.models.gpt import GPTMoE
from tests.runtime.reference import TINY
from tests.workers import Group, Groups


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _batch() -> Tensor:
    return torch.zeros(1, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("policy", "best", "must be one of 'balanced', 'hecate', 'ep'"),
        ("dense", "ddp", "must be one of 'fsdp', 'replicate', 'deepspeed', 'none'"),
        ("pools", "expert", "must be one of 'shared', 'layer'"),
        ("calibrate", True, "must be one of 'pays', 'always', False"),
        ("calibrate", ["pays"], "must be one of 'pays', 'always', False"),
        ("rematerialize", "false", "must be one of True, False"),
        ("max_imbalance", 0.9, "must be a number >= 1 and <= 2147483647"),
        ("max_imbalance", float("inf"), "must be a number >= 1 and <= 2147483647"),
        ("max_imbalance", float("nan"), "must be a number >= 1 and <= 2147483647"),
        ("max_imbalance", "1.1", "must be a number >= 1 and <= 2147483647"),
        ("max_imbalance", True, "must be a number >= 1 and <= 2147483647"),
        ("overlap_degree", 2**31, "must be an integer >= 0 and <= 2147483647"),
        ("overlap_degree", "all", 'must be an integer >= 0 and <= 2147483647 or "auto"'),
        ("memory_slots", -1, "must be an integer >= 0 and <= 2147483647"),
        ("memory_slots", 2**40, 'must be an integer >= 0 and <= 2147483647 or "auto"'),
        ("memory_slots", 1.0, "must be an integer >= 0 and <= 2147483647"),
        ("load_window", 0, "must be an integer >= 1 and <= 2147483647"),
        ("load_window", 2**63, "must be an integer >= 1 and <= 2147483647"),
        ("planning_threads", 0, 'must be an integer >= 1 and <= 2147483647 or "auto"'),
        ("planning_threads", True, 'must be an integer >= 1 and <= 2147483647 or "auto"'),
        ("reshard_interval", 2**70, "must be an integer >= 0 and <= 2147483647"),
        ("reshard_interval", None, "must be an integer >= 0 and <= 2147483647"),
        ("memory_share", 0.0, r"must be a number in \(0, 1\]"),
        ("memory_share", float("nan"), r"must be a number in \(0, 1\]"),
        ("memory_share", "0.2", r"must be a number in \(0, 1\]"),
        ("seed", None, "must be an integer"),
        ("seed", "a", "must be an integer"),
        ("token_halves", "always", r"must be one of 'auto', True, False"),
        ("token_halves", 1, r"must be one of 'auto', True, False"),
        ("cost", 3, "must be a CostModel, the path of a profile, or None"),
        ("param_dtype", torch.float16, "must be torch.float64"),
    ],
)
def test_config(setting: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=f"FSSDPConfig.{setting}=.*{rule}"):
        hecate.FSSDPConfig(**{setting: value})  # type: ignore[arg-type]


def _copies_memory(memory_slots: int, rematerialize: bool, param_dtype: torch.dtype | None) -> tuple[int, int]:
    """The peak bytes of copies over three steps, and the number of copies of the first layer in the last step."""
    config = hecate.FSSDPConfig(
        memory_slots=memory_slots, rematerialize=rematerialize, param_dtype=param_dtype, calibrate="always"
    )
    model = GPTMoE(TINY)
    engine = hecate.fully_shard(model, None, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        tokens = torch.randint(TINY.vocab_size, (2, 8), generator=torch.Generator().manual_seed(seed))
        model(tokens, tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stats = engine.stats()
    assert config.memory_slots == memory_slots
    return stats["memory_bytes"]["copies"], stats["layers"][0]["copies"]


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rematerialize", [False, True])
def test_more_slots_than_experts_take_no_more_memory(
    groups: Groups, rematerialize: bool, param_dtype: torch.dtype | None
) -> None:
    """A device can hold at most as many copies as there are experts that it does not own: half of them here."""
    for slots in (1000, 2**31 - 1):
        many = groups(2).run(_copies_memory, slots, rematerialize, param_dtype)
        assert many == groups(2).run(_copies_memory, TINY.num_experts // 2, rematerialize, param_dtype)
        assert all(copies > 0 for copies, _ in many)


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        hecate.FSSDPConfig().policy = "ep"  # type: ignore[misc]


def test_model_without_moe_layer() -> None:
    with pytest.raises(ValueError, match="Linear has no MoE layer that fits: no submodule has `expert_weights`"):
        hecate.fully_shard(nn.Linear(2, 2))


def test_launched_processes_that_cannot_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = _message(lambda: hecate.fully_shard(GPTMoE(TINY)))
    assert "WORLD_SIZE=2, but no process group is initialized, and MASTER_ADDR, MASTER_PORT are not set" in message


@pytest.mark.parametrize("version", [None, "0.18.2", "0.19.0"])
def test_deepspeed_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def find(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", find)
    message = _message(lambda: hecate.fully_shard(GPTMoE(TINY), config=hecate.FSSDPConfig(dense="deepspeed")))
    if version == "0.19.0":
        assert "FSSDPConfig.dense='deepspeed' needs a process group" in message
    else:
        assert f"needs deepspeed >= 0.19, found {version or 'none'}; install hecate-moe[deepspeed]" in message


def test_sharded_twice() -> None:
    engine = hecate.fully_shard(GPTMoE(TINY))
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.experts is under FSSDP already"):
        hecate.fully_shard(engine.model)


def test_layer_called_outside_the_model() -> None:
    model = GPTMoE(TINY)
    hecate.fully_shard(model)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.moe\.experts: called outside a forward pass of the model"):
        model.blocks[0](torch.zeros(1, 4, TINY.d_model))


def _sharded_parameters() -> str:
    from torch.distributed.fsdp import fully_shard

    model = GPTMoE(TINY)
    fully_shard(model)
    return _message(lambda: hecate.fully_shard(model))


def _mesh_of_a_part() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "shard"))["shard"]
    return _message(lambda: hecate.fully_shard(GPTMoE(TINY), mesh))


def _different_configs() -> str:
    config = hecate.FSSDPConfig(load_window=5 + dist.get_rank() // 2)
    return _message(lambda: hecate.fully_shard(GPTMoE(TINY), None, config))


class _Router(nn.Module):
    """Chooses expert `index` for every token, with weight `weight`."""

    def __init__(self, index: int, weight: float) -> None:
        super().__init__()
        self.index, self.weight = index, weight

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.full((hidden.shape[0], 2), self.index)
        return _Routing(index, torch.full(index.shape, self.weight), hidden.sum())


class _Routing(tuple):
    def __new__(cls, *values: Tensor) -> _Routing:
        return super().__new__(cls, values)

    expert_index = property(lambda self: self[0])
    weights = property(lambda self: self[1])
    aux_loss = property(lambda self: self[2])


def _bad_router(index: int, weight: float) -> str:
    model = GPTMoE(TINY)
    if dist.get_rank() == 1:
        model.blocks[1].moe.gate = _Router(index, weight)
    hecate.fully_shard(model, None, hecate.FSSDPConfig(dense="none"))
    return _message(lambda: model(_batch()))


def test_parameters_already_sharded(groups: Groups) -> None:
    for message in groups(2).run(_sharded_parameters):
        assert "parameter" in message
        assert "is sharded already" in message


def test_mesh_of_another_size(groups: Groups) -> None:
    for message in groups(4).run(_mesh_of_a_part):
        assert "the mesh has 2 devices, the process group 4 ranks; they must be equal" in message


def test_ranks_with_different_configs(groups: Groups) -> None:
    for message in groups(3).run(_different_configs):
        assert "config.load_window is 5 on rank 0 and 6 on rank 2" in message


def test_router_out_of_range(groups: Groups) -> None:
    for message in groups(2).run(_bad_router, 8, 0.5):
        assert "blocks.1.moe.experts: the router of rank 1 chose 16 experts outside [0, 8)" in message


def test_router_not_finite(groups: Groups) -> None:
    for message in groups(2).run(_bad_router, 0, float("nan")):
        assert "blocks.1.moe.experts: the router of rank 1 gave 16 weights that are NaN or infinite" in message


def _train_until_killed() -> str:
    model = GPTMoE(TINY)
    engine = hecate.fully_shard(model, None, hecate.FSSDPConfig())
    model(_batch(), _batch()).loss.backward()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)

    def train() -> None:
        with engine.naming_missing_ranks():
            while True:
                model(_batch(), _batch()).loss.backward()

    return _message(train)


def test_names_a_peer_that_dies_in_training() -> None:
    group = Group(3, timeout=timedelta(seconds=20))
    try:
        for pipe in group.pipes:
            pipe.send((_train_until_killed, ()))
        for rank in (0, 2):
            assert "MissingRankError: rank 1 is missing" in group.pipes[rank].recv()[1]
    finally:
        group.close()
