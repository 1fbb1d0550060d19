"""A model changed after sharding is refused on all ranks, before anything is sent; the error names the change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import hecate
from hecate.models.gpt import GPTMoE
from hecate.models.transformer import Block
from tests.runtime.reference import TINY
from tests.workers import Groups

TOKENS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(TINY.d_model, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def _adapt(model: nn.Module) -> None:
    model.blocks[1].attention_norm = Adapted(model.blocks[1].attention_norm)


def _resize(model: nn.Module) -> None:
    model.tokens = nn.Embedding(40, TINY.d_model)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "dtype": (lambda m: m.to(torch.bfloat16), r"blocks.0.moe.experts.up is torch.bfloat16"),
    "adapter": (_adapt, "blocks.1.attention_norm.down.weight were added"),
    "embedding": (_resize, "tokens.weight were given another shape"),
}


def _changed(change: str, dense: str) -> str:
    model = GPTMoE(TINY)
    hecate.fully_shard(model, None, hecate.FSSDPConfig(dense=dense))
    model(TOKENS[:, :-1], TOKENS[:, 1:]).loss.backward()
    CHANGES[change][0](model)
    with pytest.raises(RuntimeError) as raised:
        model(TOKENS[:, :-1], TOKENS[:, 1:])
    return str(raised.value)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_changes_are_named(groups: Groups, change: str, dense: str) -> None:
    for message in groups(2).run(_changed, change, dense):
        assert CHANGES[change][1] in message
        assert "before hecate.fully_shard" in message


def test_wrappers_are_no_change() -> None:
    model = GPTMoE(TINY)
    hecate.fully_shard(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    model(TOKENS[:, :-1], TOKENS[:, 1:]).loss.backward()
    model.new_part = nn.Identity()  # without parameters
    model(TOKENS[:, :-1], TOKENS[:, 1:]).loss.backward()


@pytest.mark.parametrize("use", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(use: Callable[[nn.Module], object]) -> None:
    engine = hecate.fully_shard(GPTMoE(TINY))
    with pytest.raises(TypeError, match="a model under FSSDP cannot be copied or pickled"):
        use(engine.model)


def _wrap() -> None:
    model = GPTMoE(TINY)
    engine = hecate.fully_shard(model)
    before = [p.detach().clone() for pool in engine.pools for p in pool.parameters.values()]
    with pytest.raises(TypeError, match=r"prepare everything but the model"):
        nn.parallel.DistributedDataParallel(model)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.pools[0].parameters.values(), strict=True))
    engine.close()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_data_parallel_wrappers_are_refused(groups: Groups) -> None:
    groups(2).run(_wrap)


def _prepared() -> tuple[list[float], list[float]]:
    losses = []
    for prepare in (lambda optimizer: optimizer, Accelerator(cpu=True).prepare):
        torch.manual_seed(0)
        engine = hecate.fully_shard(GPTMoE(TINY), None, hecate.FSSDPConfig(reshard_interval=1))
        optimizer = prepare(torch.optim.AdamW(engine.model.parameters(), lr=0.1))
        run = []
        for _ in range(3):
            loss = engine.model(TOKENS[:, :-1], TOKENS[:, 1:]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    return losses[0], losses[1]


def test_an_optimizer_prepared_by_accelerate(groups: Groups) -> None:
    for plain, prepared in groups(2).run(_prepared):
        assert prepared == plain
        assert plain[2] < plain[0]


def test_an_optimizer_made_before_is_refused() -> None:
    model = GPTMoE(TINY)
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    hecate.fully_shard(model)
    with pytest.raises(RuntimeError, match=r"SGD was made before hecate\.fully_shard"):
        before.step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
