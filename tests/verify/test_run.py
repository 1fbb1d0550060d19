"""`hecate.verify` passes if training equals the plain model's; otherwise it fails and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import hecate
from hecate.verify.report import Report
from tests.verify.models import QUICK, by_whole_norm, gpt, pairs, verified
from tests.workers import Groups

WAYS = [
    "as configured",
    "policy balanced",
    "policy hecate",
    "policy ep",
    "re-sharding",
    "rematerialize",
    "recomputation",
    "no_sync",
    "evaluation",
    "save and load",
    "all of these",
]


def on_two(groups: Groups, model: str, settings: dict[str, Any]) -> Report:
    first, second = groups(2).run(verified, model, settings)
    assert first == second
    return first


@pytest.mark.parametrize(("model", "kinds"), [("gpt", ("up", "down")), ("qwen", ("gate_up_proj", "down_proj"))])
def test_two_models_train_as_plain(model: str, kinds: tuple[str, ...], groups: Groups) -> None:
    report = on_two(groups, model, {"steps": 3})
    assert report.ok, str(report)
    assert list(dict.fromkeys(row.way for row in report.rows)) == ["start", "plain, again", *WAYS]
    gradients = [f"gradient {part}" for part in ("dense", "router", *(f"experts {kind}" for kind in kinds))]
    for way in WAYS:
        quantities = {row.quantity for row in report.rows if row.way == way}
        assert quantities >= {"loss", *gradients, "norm", "loads", "weights"}
        assert ("reloaded weights" in quantities) == (way in ("save and load", "all of these"))
        assert ("evaluation loss" in quantities) == (way in ("evaluation", "all of these"))
    assert all(row.tolerance == 1e-9 for row in report.rows if row.quantity == "loss")
    assert all(report.activity[way]["moved"] > 0 for way in ("re-sharding", "rematerialize", "all of these")), str(
        report
    )
    assert all(report.activity[f"policy {policy}"]["copies"] > 0 for policy in ("balanced", "hecate")), str(report)
    assert report.activity["policy ep"] == {"copies": 0, "moved": 0}


def test_one_device() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    report = verified("gpt")
    assert report.ok, str(report)
    assert "1 rank," in report.title
    assert torch.equal(torch.rand(3), expected)  # the caller's generator goes on where it was


def test_replicas(groups: Groups) -> None:
    first, second = groups(2).run(verified_on_replicas)
    assert first == second
    assert first.ok, str(first)


def verified_on_replicas() -> Report:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return verified("gpt", {**QUICK, "mesh": mesh})


def test_config_of_the_user_and_the_model_s_own_precision(groups: Groups) -> None:
    config = hecate.FSSDPConfig(dense="replicate", pools="layer", reshard_interval=0)
    report = on_two(groups, "gpt", {**QUICK, "config": config, "dtype": None})
    assert report.ok, str(report)
    assert "float32" in report.title
    assert {row.tolerance for row in report.rows} == {0.0, 1e-4}


def test_precisions_of_the_config_are_set_aside() -> None:
    config = hecate.FSSDPConfig(param_dtype=torch.bfloat16, reshard_interval=0)
    report = verified("gpt", {**QUICK, "config": config})
    assert report.ok
    assert any("param_dtype=torch.bfloat16" in note for note in report.notes)


# Cases in which it must fail.


def test_ranks_with_different_weights(groups: Groups) -> None:
    report = on_two(groups, "different on rank 1", QUICK)
    (row,) = report.failures
    assert (row.way, row.quantity, row.verdict) == ("start", "weights at start", "differs")
    assert row.where.startswith("rank 1, ")
    assert len(report.rows) == 1
    assert row.where in str(report)


def test_noise_that_nobody_seeds(groups: Groups) -> None:
    report = on_two(groups, "own noise", QUICK)
    assert {row.way for row in report.rows} == {"start", "plain, again"}
    assert {"loss", "norm"} <= {row.quantity for row in report.failures}


def test_model_that_looks_for_its_experts(groups: Groups) -> None:
    report = on_two(groups, "reads experts", QUICK)
    failed = {row.way: row for row in report.failures}
    assert set(failed) == {row.way for row in report.rows} - {"start", "plain, again"}
    for row in failed.values():
        assert row.verdict == "failed"
        assert "AttributeError" in row.where
        assert "'square'" in row.where


def test_loss_that_depends_on_the_rank(groups: Groups) -> None:
    report = on_two(groups, "loss of rank", QUICK)
    wrong = {row.quantity for row in report.failures if row.way == "as configured"}
    assert {"loss", "gradient dense", "gradient experts up"} <= wrong
    assert all(row.ok for row in report.rows if row.quantity == "loads" and row.where.startswith("step 0"))


def test_optimizer_that_looks_at_its_own_part(groups: Groups) -> None:
    report = on_two(groups, "gpt", {**QUICK, "steps": 1, "optimizer_fn": by_whole_norm})
    assert {row.quantity for row in report.failures} == {"weights", "evaluation loss"}  # both after the step
    assert {row.way for row in report.failures} == {row.way for row in report.rows} - {"start", "plain, again"}
    assert "not equal: as configured: weights" in str(report)


# Arguments that it must refuse.


def dense_model() -> nn.Module:
    return nn.Linear(4, 4)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return gpt()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_fn": 3}, "model_fn=3: must be a function"),
    ({"model_fn": lambda: None}, "model_fn returned NoneType; must be a torch.nn.Module"),
    ({"model_fn": dense_model}, "no MoE layer"),
    ({"model_fn": on_meta}, "on the meta device"),
    ({"batch_fn": lambda number, rank, size: None}, "batch_fn takes number, rank, size; must take"),
    ({"batch_fn": lambda number: pairs(number, 0)[:1]}, "the loss is NoneType"),
    ({"loss_fn": lambda model, batch: model(*batch).logits}, "the loss is a tensor of shape"),
    ({"loss_fn": lambda model, batch: model(*batch).loss.detach()}, "depends on no parameter"),
    ({"optimizer_fn": lambda model: model}, "optimizer_fn returned GPTMoE"),
    ({"steps": 0}, "steps=0: must be an integer >= 1"),
    ({"accumulate": True}, "accumulate=True: must be an integer >= 1"),
    ({"config": {}}, "config={}: must be a hecate.FSSDPConfig"),
    ({"config": hecate.FSSDPConfig(dense="none")}, "config.dense='none'"),
    ({"policies": ["best"]}, "policies=.'best'.: must be at least one of 'balanced'"),
    ({"policies": "ep"}, "policies='ep': must be at least one of"),
    ({"dtype": torch.float16}, "dtype=torch.float16: must be None or one of"),
    ({"tolerance": float("nan")}, "tolerance=nan: must be > 0"),
    ({"max_norm": 0}, "max_norm=0: must be > 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        hecate.verify(**{"model_fn": gpt, "batch_fn": pairs, **QUICK, **changes})


def test_model_fn_must_repeat_itself() -> None:
    with pytest.raises(ValueError, match=r"model_fn gave other values of .* when it was called again"):
        verified("no two alike")


def test_ranks_must_ask_for_the_same(groups: Groups) -> None:
    for error in groups(2).run(steps_by_rank):
        assert "verify: steps is 1 on rank 0 and 2 on rank 1" in error


def steps_by_rank() -> str:
    with pytest.raises(ValueError, match="verify") as refused:
        verified("gpt", {"steps": 1 + torch.distributed.get_rank()})
    return str(refused.value)
