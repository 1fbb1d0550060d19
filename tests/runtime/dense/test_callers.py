"""The dense part left to the caller, who applies FSDP2 with settings of their own: same result as the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as fsdp2

import hecate
from hecate.models.gpt import GPTMoE
from tests.bench import device
from tests.runtime.helpers import SMALL, Pair, gpt
from tests.workers import Groups


def by_caller(engine: hecate.FSSDP, **settings: Any) -> None:
    """As docs/fsdp2.md says."""
    model = engine.model
    assert isinstance(model, GPTMoE)
    experts = {p for pool in engine.pools for p in pool.parameters.values()}
    for unit in [*(block.attention for block in model.blocks), *model.blocks, model]:  # finer units than Hecate's own
        fsdp2(unit, mesh=engine.mesh, ignored_params=experts, **settings)
    blocks: Any = model.blocks
    blocks[0].set_modules_to_forward_prefetch([blocks[1]])


def loss_of(model: nn.Module, of: int) -> torch.Tensor:
    tokens = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(of)).to(device())
    return model(tokens[:, :-1], tokens[:, 1:]).loss


def trains(settings: dict[str, Any], folder: str) -> None:
    pair = Pair(gpt(SMALL), dense="none", reshard_interval=1)
    by_caller(pair.engine, **settings)
    optimizers = pair.optimizers(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    for _ in range(3):
        model: Any = pair.model
        model.set_requires_gradient_sync(False)  # what engine.no_sync does for Hecate's own FSDP2
        pair.backward(loss_of)
        model.set_requires_gradient_sync(True)
        pair.backward(lambda m, r: loss_of(m, r + 10))
        pair.check_gradients()
        norms = [pair.engine.clip_grad_norm_(0.1), torch.nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.1)]
        torch.testing.assert_close(norms[0].cpu(), norms[1].cpu())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        pair.check_state()
    pair.engine.save(Path(folder) / "saved", optimizers[0])
    with torch.no_grad():
        for p in pair.model.parameters():
            p.zero_()
    pair.engine.load(Path(folder) / "saved", optimizers[0])
    pair.check_state()


def test_own_units_resharding_and_prefetch(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(trains, {"reshard_after_forward": False, "mp_policy": MixedPrecisionPolicy()}, str(tmp_path))


def test_cpu_offload(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(trains, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, str(tmp_path))
