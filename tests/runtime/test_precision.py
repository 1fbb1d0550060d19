"""float32 master weights with bfloat16 compute: what is kept in which dtype, and that it learns the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import hecate
from hecate.models.gpt import GPTMoE
from hecate.models.transformer import ModelConfig
from hecate.values.local import local_tensor
from tests.runtime.helpers import config
from tests.runtime.reference import TINY
from tests.workers import Groups

BF16 = torch.bfloat16


def _train(
    settings: hecate.FSSDPConfig, model_config: ModelConfig = TINY
) -> tuple[list[float], set[torch.dtype], set[torch.dtype]]:
    """Losses, dtypes of parameters and of what the experts compute in."""
    model = GPTMoE(model_config)
    engine = hecate.fully_shard(model, None, settings)
    computed = set()
    mlp = model.blocks[0].moe.experts.hecate_spec.mlp

    def watched(x, groups, weights):  # type: ignore[no-untyped-def]
        computed.update({x.dtype, *(w.dtype for w in weights.values())})
        return mlp(x, groups, weights)

    object.__setattr__(model.blocks[0].moe.experts.hecate_spec, "mlp", watched)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        tokens = torch.randint(31, (4, 17), generator=torch.Generator().manual_seed(dist.get_rank()))
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses, {local_tensor(p).dtype for p in model.parameters()}, computed


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
@pytest.mark.parametrize("rematerialize", [False, True])
def test_bf16_compute_with_float32_master(groups: Groups, dense: str, rematerialize: bool) -> None:
    exact = groups(2).run(_train, config("balanced", dense=dense))[0][0]
    settings = config("balanced", dense=dense, param_dtype=BF16, rematerialize=rematerialize, reshard_interval=2)
    losses, parameters, computed = groups(2).run(_train, settings)[0]
    assert parameters == {torch.float32}
    assert computed == {BF16}
    assert losses == pytest.approx(exact, rel=2e-2)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("rematerialize", [False, True])
def test_a_rank_without_experts_or_copies(groups: Groups, rematerialize: bool) -> None:
    two_experts = replace(TINY, num_experts=2, num_layers=1)
    exact = groups(3).run(_train, config("ep"), two_experts)[0][0]
    settings = config("ep", param_dtype=BF16, rematerialize=rematerialize)
    assert groups(3).run(_train, settings, two_experts)[0][0] == pytest.approx(exact, rel=2e-2)


def test_gradients_travel_in_reduce_dtype(groups: Groups) -> None:
    in_float32 = groups(2).run(_train, config("balanced", param_dtype=BF16, reduce_dtype=torch.float32))[0][0]
    in_bfloat16 = groups(2).run(_train, config("balanced", param_dtype=BF16))[0][0]
    assert in_float32 != in_bfloat16
    assert in_float32 == pytest.approx(in_bfloat16, rel=1e-2)


def test_master_dtype_converts_the_model(groups: Groups) -> None:
    _, parameters, computed = groups(2).run(_train, config("balanced", master_dtype=torch.float64))[0]
    assert parameters == {torch.float64}
    assert computed == {torch.float64}
