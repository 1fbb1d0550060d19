"""The load-balance loss of all ranks' tokens: loss and gradients are those of one process with the joined batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from hecate.models import GPTMoE, ModelConfig, TopKGate
from hecate.models.moe import AuxScope
from tests.workers import Groups

E, D = 5, 6
SEQUENCES = 12


def gate(aux_scope: AuxScope) -> TopKGate:
    made = TopKGate(D, E, aux_scope=aux_scope).double()
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(1))
    return made


def hidden() -> Tensor:
    return torch.randn(17, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def part(rows: Tensor) -> Tensor:
    """Unequal shares: rank r has r + 1 parts of all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    start, end = (len(rows) * r * (r + 1) // (size * (size + 1)) for r in (rank, rank + 1))
    return rows[start:end]


def _gate_gradient(aux_scope: AuxScope, empty: bool) -> tuple[Tensor, Tensor, list[int]]:
    """The loss of this rank, the gate's gradient averaged over the ranks, and the tokens of every rank."""
    made, rows = gate(aux_scope), part(hidden())
    if empty:
        rows = hidden() if dist.get_rank() == 0 else rows[:0]
    loss = made(rows).aux_loss
    loss.backward()
    assert made.weight.grad is not None
    dist.all_reduce(made.weight.grad)
    tokens = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    tokens[dist.get_rank()] = len(rows)
    dist.all_reduce(tokens)
    return loss.detach(), made.weight.grad / dist.get_world_size(), tokens.tolist()


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_unequal_tokens_a_rank(groups: Groups, world_size: int, empty: bool) -> None:
    plain = gate("rank")
    expected = plain(hidden()).aux_loss
    expected.backward()
    for loss, gradient, tokens in groups(world_size).run(_gate_gradient, "global", empty):
        assert sum(tokens) == 17
        assert world_size == 1 or len(set(tokens)) > 1
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, plain.weight.grad)
    if world_size > 1 and not empty:
        losses = [loss for loss, _, _ in groups(world_size).run(_gate_gradient, "rank", empty)]
        assert max(losses) - min(losses) > 1e-3  # else the option would have nothing to change


def _model_step(checkpoint: bool, training: bool) -> tuple[float, float, float]:
    """(loss, auxiliary loss, gradient norm) of the same sequences on however many ranks, averaged."""
    config = ModelConfig(
        vocab_size=31, d_model=16, num_layers=2, num_heads=2, max_length=8, aux_weight=0.5, aux_scope="global",
        checkpoint=checkpoint,
    )  # fmt: skip
    model = GPTMoE(config).double()
    model.init_weights(1)
    engine = hecate.fully_shard(model.train(training))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.mul_(30)  # choices far from even, and other ones on every rank
    tokens = torch.randint(31, (SEQUENCES, 9), generator=torch.Generator().manual_seed(0))
    tokens = tokens[dist.get_rank() :: dist.get_world_size()]
    out = model(tokens[:, :-1], tokens[:, 1:])
    out.loss.backward()
    losses = torch.stack([out.loss.detach(), out.aux_loss.detach()])
    dist.all_reduce(losses)
    loss, aux = (losses / dist.get_world_size()).tolist()
    return loss, aux, float(engine.clip_grad_norm_(1e9))


@pytest.mark.parametrize(("checkpoint", "training"), [(False, True), (True, True), (False, False)])
def test_sharded_model_is_that_of_one_process(groups: Groups, checkpoint: bool, training: bool) -> None:
    (alone,) = groups(1).run(_model_step, checkpoint, training)
    for world_size in (2, 3):
        for step in groups(world_size).run(_model_step, checkpoint, training):
            assert step == pytest.approx(alone, rel=1e-10)


def test_without_a_process_group_both_are_the_same() -> None:
    assert gate("global")(hidden()).aux_loss == gate("rank")(hidden()).aux_loss


def test_other_scopes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ModelConfig\.aux_scope='node': must be one of rank, global"):
        ModelConfig(aux_scope="node")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TopKGate: aux_scope='node' must be one of rank, global"):
        TopKGate(D, E, aux_scope="node")  # type: ignore[arg-type]
