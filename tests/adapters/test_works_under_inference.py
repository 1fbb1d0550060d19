"""Evaluation and `generate()` under FSSDP, on ranks that do the same and on ones that do not."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from tests.adapters.parity import batch, close, spread_router
from tests.adapters.tiny import tiny_model
from tests.adapters.ways import CONFIG, error_of, loss_of
from tests.workers import Group, Groups


def models(dense: str) -> tuple[Any, Any, hecate.FSSDP]:
    """(plain, sharded, engine), after a step, so that there are copies."""
    plain = spread_router(tiny_model("qwen3_moe"))
    engine = hecate.fully_shard(copy.deepcopy(plain), None, replace(CONFIG, dense=dense))
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.0)
    loss_of(engine.model, batch(0, dist.get_rank())).backward()
    optimizer.step()
    optimizer.zero_grad()
    return plain, engine.model, engine


def prompt(length: int) -> dict[str, Tensor]:
    tokens = batch(3, dist.get_rank())[:, :length]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def evaluate(dense: str, mode: str) -> None:
    plain, model, _ = models(dense)
    for m in (plain, model):
        m.eval()
    tokens = batch(1, dist.get_rank())
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]():
        output = model(input_ids=tokens, labels=tokens)
        expected = plain(input_ids=tokens, labels=tokens)
    assert not output.loss.requires_grad
    close("logits", output.logits, expected.logits)
    close("loss", output.loss, expected.loss)
    loss_of(model.train(), tokens).backward()  # training goes on


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_evaluation(groups: Groups, dense: str, mode: str) -> None:
    groups(2).run(evaluate, dense, mode)


def generate(dense: str, unequal: bool, options: dict[str, Any]) -> None:
    """Prompts and answers of other lengths on each rank; what a rank generates does not depend on the others."""
    plain, model, _ = models(dense)
    rank = dist.get_rank()
    length, new_tokens = (4 + rank, 5 + 3 * rank) if unequal else (4, 5)
    for _ in range(2):
        answers = []
        for m in (plain, model):
            torch.manual_seed(rank)
            answers.append(m.eval().generate(**prompt(length), min_new_tokens=3, max_new_tokens=new_tokens, **options))
        assert torch.equal(*answers)
    loss_of(model.train(), batch(2, rank)).backward()


@pytest.mark.parametrize(
    ("dense", "unequal", "options"),
    [
        ("fsdp", False, {"synced_gpus": False}),
        ("fsdp", True, {"synced_gpus": True, "do_sample": True}),
        ("fsdp", True, {}),  # the default: transformers sees FSDP2
        ("replicate", True, {}),  # the default, by our mark
        ("none", True, {"num_beams": 2}),
    ],
)
def test_generate(groups: Groups, dense: str, unequal: bool, options: dict[str, Any]) -> None:
    groups(2).run(generate, dense, unequal, options)


def generate_out_of_step() -> str:
    """Rank 0 ends first and trains on, where rank 1 still generates."""
    _, model, _ = models("replicate")

    def run() -> None:
        model.generate(**prompt(4), min_new_tokens=4 + 4 * dist.get_rank(), max_new_tokens=8, synced_gpus=False)
        loss_of(model, batch(2, 0)).backward()

    if dist.get_rank() == 0:
        model.generation_config.eos_token_id = list(range(64))  # stops at min_new_tokens
    return error_of(run)


def test_ranks_out_of_step_are_named(groups: Groups) -> None:
    for message in groups(2).run(generate_out_of_step):
        assert "model.layers.0.mlp.experts: the pass is MoE layer 0 with gradients" in message
        assert "on rank 0 and MoE layer 0 without gradients" in message
        assert "on rank 1; all ranks must call the model equally often, in the same mode and with the same" in message
        assert "needs synced_gpus=True" in message


def generate_alone(seconds: float) -> str:
    """Rank 0 ends first and does not call the model again."""
    _, model, engine = models("fsdp")
    message = "waited"
    if dist.get_rank() == 1:

        def run() -> None:
            with engine.naming_missing_ranks():
                model.generate(**prompt(4), max_new_tokens=4, synced_gpus=False)

        message = error_of(run)
        dist.distributed_c10d._get_default_store().set("failed", "1")  # type: ignore[attr-defined]
    else:
        dist.distributed_c10d._get_default_store().wait(["failed"], timedelta(seconds=seconds))
    return message


@pytest.mark.long
def test_a_rank_that_waits_in_vain_learns_why() -> None:
    group = Group(2, timedelta(seconds=4))
    try:
        waited, failed = group.run(generate_alone, 50.0)
        assert waited == "waited"
        assert "Timed out waiting" in failed
        assert "All ranks are alive, so they have called the model or an MoE layer of it unequally often" in failed
        assert "synced_gpus=True" in failed
    finally:
        group.close()
