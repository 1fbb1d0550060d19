"""A run that is saved and resumed elsewhere equals an uninterrupted run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import hecate
from hecate.placement import initial_owners
from tests.checkpoint.runs import BALANCED, TINY, Run, plain_model
from tests.checkpoint.states import Full, assert_close, assert_equal
from tests.workers import Groups

# Stock DCP says so of every call without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@dataclass(frozen=True)
class Unbroken:
    """A run of 6 steps, saved after 3.

    Attributes:
        path: path of the checkpoint.
        losses, plans: losses and plans of steps 3, 4 and 5.
        at_save, at_end: all parameters and buffers at these times.
        copies: number of copies in the last step.
        owners: owners by layer when it was saved.
    """

    path: str
    losses: list[float]
    plans: list[object]
    at_save: Full
    at_end: Full
    copies: int
    owners: list[list[int]]


def unbroken(path: str, evaluate: bool = False, **settings: object) -> Unbroken:
    run = Run(**settings)  # type: ignore[arg-type]
    run.train(0, 3)
    if evaluate:
        run.evaluate()
    for group in run.optimizer.param_groups:
        group["lr"] *= 0.5
    run.engine.save(path, run.optimizer)
    at_save, owners = run.engine.full_state_dict(), run.owners()
    losses = run.train(3, 6)
    return Unbroken(path, losses, run.plans[3:], at_save, run.engine.full_state_dict(), run.copies(), owners)


@dataclass(frozen=True)
class Resumed:
    """Steps 3, 4 and 5 after `Unbroken.path` was loaded."""

    losses: list[float]
    plans: list[object]
    at_load: Full
    at_end: Full


def resumed(path: str, used: bool = False, **settings: object) -> Resumed:
    run = Run(seed=7, **settings)  # type: ignore[arg-type]
    if used:  # other owners, optimizer state and gradients are there already
        run.train(10, 12)
        run.loss(12).backward()
    run.engine.load(path, run.optimizer)
    loaded = run.engine.full_state_dict()
    run.plans.clear()
    return Resumed(run.train(3, 6), run.plans, loaded, run.engine.full_state_dict())


def assert_same_run(ranks: list[Resumed], ranks_saved: list[Unbroken]) -> None:
    """The resumed run has the same bits on every rank, and the same plans."""
    for run, saved in zip(ranks, ranks_saved, strict=True):
        assert_equal(run.at_load, saved.at_save)
        assert run.losses == saved.losses
        assert run.plans == saved.plans
        assert_equal(run.at_end, saved.at_end)


def assert_similar_run(ranks: list[Resumed], saved: Unbroken) -> None:
    """Everything that was saved is restored exactly; further steps are equal within rounding."""
    for run in ranks:
        assert_equal(run.at_load, saved.at_save)
        assert run.losses == pytest.approx(saved.losses, rel=1e-6)
        assert_close(run.at_end, saved.at_end)


@pytest.fixture(scope="module")
def both_saved(groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> list[Unbroken]:
    """By rank."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    ranks: list[Unbroken] = groups(2).run(unbroken, str(path))
    run = ranks[0]
    even = [initial_owners(TINY.num_experts, 2, layer * TINY.num_experts).tolist() for layer in range(TINY.num_layers)]
    assert run.copies > 0, "a run without copies tests less"
    assert run.owners != even, "a run without moved experts tests less"
    assert not [p for p in path.parent.iterdir() if p != path]
    return ranks


@pytest.fixture(scope="module")
def saved(both_saved: list[Unbroken]) -> Unbroken:
    return both_saved[0]


@pytest.mark.parametrize("used", [False, True])
def test_equal_bits_at_the_same_world_size(groups: Groups, both_saved: list[Unbroken], used: bool) -> None:
    assert_same_run(groups(2).run(resumed, both_saved[0].path, used), both_saved)


def test_another_world_size(groups: Groups, saved: Unbroken) -> None:
    assert_similar_run(groups(3).run(resumed, saved.path), saved)


def test_room_for_copies_is_the_saved_runs(groups: Groups, tmp_path: Path) -> None:
    """Memory_slots="auto" depends on the memory that is free when a process starts; plans may not."""
    auto = {"config": replace(BALANCED, memory_slots="auto")}
    path = str(tmp_path / "checkpoint")
    ranks = groups(2).run(unbroken_with, path, auto)
    assert_same_run(groups(2).run(resumed_with_less_memory, path, auto), ranks)


def resumed_with_less_memory(path: str, settings: dict[str, object]) -> Resumed:
    with patch("hecate.runtime.plans.layer.memory_slots", return_value=1) as free:
        result = resumed_with(path, settings)
    assert free.called
    return result


@pytest.mark.parametrize("used", [False, True])
def test_one_device_without_a_process_group(saved: Unbroken, used: bool) -> None:
    assert_similar_run([resumed(saved.path, used)], saved)


def test_saved_by_one_device_loaded_by_three(groups: Groups, tmp_path: Path) -> None:
    one = unbroken(str(tmp_path / "one"))
    assert_similar_run(groups(3).run(resumed, one.path), one)


@dataclass(frozen=True)
class Variant:
    """Settings of a run that is saved and resumed on `world` ranks."""

    world: int
    settings: dict[str, object]


VARIANTS = {
    "replicas": Variant(4, {"mesh": (2, 2)}),
    "dense replicated": Variant(2, {"config": replace(BALANCED, dense="replicate")}),
    "re-materialized": Variant(2, {"config": replace(BALANCED, rematerialize=True)}),
    "the paper's policy": Variant(2, {"config": replace(BALANCED, policy="hecate")}),
    "after an evaluation": Variant(2, {"evaluate": True}),
    "SGD": Variant(2, {"optimizer": "SGD"}),
    # Its state has a row per expert in other shapes than the parameter's.
    "Adafactor": Variant(2, {"optimizer": "Adafactor"}),
    "a pool a layer": Variant(2, {"config": replace(BALANCED, pools="layer")}),
    "parameter groups": Variant(2, {"optimizer": "groups"}),
    "tied weights": Variant(2, {"tied": True}),
    "frozen experts": Variant(2, {"frozen": "blocks.1.moe.experts"}),
    "experts that devices do not divide": Variant(3, {"model": replace(TINY, num_experts=7)}),
    "a device without experts": Variant(3, {"model": replace(TINY, num_experts=2, num_layers=1)}),
}


def unbroken_with(path: str, settings: dict[str, object]) -> Unbroken:
    return unbroken(path, **settings)


def resumed_with(path: str, settings: dict[str, object]) -> Resumed:
    return resumed(path, **{key: value for key, value in settings.items() if key != "evaluate"})


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_bits_under(groups: Groups, tmp_path: Path, name: str) -> None:
    variant, path = VARIANTS[name], str(tmp_path / "checkpoint")
    ranks = groups(variant.world).run(unbroken_with, path, variant.settings)
    assert_same_run(groups(variant.world).run(resumed_with, path, variant.settings), ranks)


def test_tied_weights_have_both_names(tmp_path: Path) -> None:
    run = unbroken(str(tmp_path / "checkpoint"), tied=True)
    metadata = dcp.FileSystemReader(run.path).read_metadata().state_dict_metadata
    assert {"head.weight", "tokens.weight", "numbers", "optimizer.state.tokens.weight.exp_avg"} <= metadata.keys()
    assert "optimizer.state.head.weight.exp_avg" not in metadata
    with pytest.raises(ValueError, match=r"trained parameters, the checkpoint lacks head\.weight$"):
        resumed(run.path)


def test_another_policy(groups: Groups, saved: Unbroken) -> None:
    ep = {"config": hecate.FSSDPConfig(policy="ep", dense="replicate")}
    assert_similar_run(groups(2).run(resumed_with, saved.path, ep), saved)


def test_dense_part_left_to_the_caller(groups: Groups, saved: Unbroken) -> None:
    for loaded in groups(2).run(loaded_with_plain_dense_part, saved.path):
        assert_equal(loaded, saved.at_save)


def loaded_with_plain_dense_part(path: str) -> Full:
    run = Run(hecate.FSSDPConfig(dense="none"), seed=7)
    run.engine.load(path, run.optimizer)
    return run.engine.full_state_dict()


def test_replicas_write_each_expert_once(groups: Groups, tmp_path: Path) -> None:
    run: Unbroken = groups(4).run(unbroken_with, str(tmp_path / "four"), {"mesh": (2, 2)})[0]
    metadata = dcp.FileSystemReader(run.path).read_metadata()
    for name in ("blocks.0.moe.experts.up", "optimizer.state.blocks.2.moe.experts.down.exp_avg_sq"):
        entry = metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        offsets = sorted(tuple(chunk.offsets) for chunk in entry.chunks)
        assert offsets == [(expert, 0, 0) for expert in range(TINY.num_experts)]
    assert_similar_run([resumed(run.path)], run)


def test_stock_dcp_reads_stacked_tensors_in_one_process(saved: Unbroken) -> None:
    state = plain_model(seed=7).state_dict()
    dcp.load(state, checkpoint_id=saved.path)
    assert_equal(dict(state), saved.at_save)
    moments = {f"optimizer.state.{n}.exp_avg": torch.zeros_like(p) for n, p in plain_model().named_parameters()}
    dcp.load(moments, checkpoint_id=saved.path)
    assert all(moment.any(dim=-1).any() for moment in moments.values())


def test_dense_checkpoint_loads_sharded(groups: Groups, tmp_path: Path) -> None:
    plain = plain_model(seed=3).state_dict()
    dcp.save(dict(plain), checkpoint_id=tmp_path / "plain")
    for loaded in groups(2).run(weights_only, str(tmp_path / "plain")):
        assert_equal(loaded, dict(plain))


def extra_of(path: str, extra: dict[str, object] | None, in_background: bool) -> dict[str, object]:
    run = Run()
    handle = run.engine.save(path, run.optimizer, async_op=in_background, extra=extra)
    if extra is not None:
        extra["sequences"] = "changed later"
    if handle is not None:
        handle.wait()
    return run.engine.load(path, run.optimizer)


@pytest.mark.parametrize("in_background", [False, True])
def test_extra_comes_back(groups: Groups, tmp_path: Path, in_background: bool) -> None:
    extra = {"sequences": 1234, "scheduler": {"last_lr": [0.1, 3e-5], "name": "cosine", "done": False}}
    for loaded in groups(2).run(extra_of, str(tmp_path / "with"), extra, in_background):
        assert loaded == extra
    assert extra_of(str(tmp_path / "without"), None, in_background) == {}


def weights_only(path: str) -> Full:
    run = Run(seed=7)
    run.train(0, 2)
    run.engine.load(path)
    with pytest.raises(ValueError, match="saved without an optimizer"):
        run.engine.load(path, run.optimizer)
    return run.engine.full_state_dict()
