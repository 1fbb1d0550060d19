"""torch.distributed.checkpoint as it is, with the optimizer: saved at one number of devices, resumed at another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from tests.checkpoint.plain import Plain, Way, assert_same
from tests.checkpoint.runs import Run, make_optimizer
from tests.checkpoint.wrappers import wrap
from tests.workers import Groups

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:FSDP.state_dict_type")

PLAIN = StateDictOptions()
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def stock_state(run: Run, options: StateDictOptions) -> dict[str, Any]:
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    return {"model": model, "optimizer": optimizer}


def saved(folder: str, way: Way, options: StateDictOptions) -> None:
    run = way.run()
    run.train(0, 3)
    dcp.save(stock_state(run, options), checkpoint_id=folder)


def resumed(folder: str, way: Way, options: StateDictOptions, used: bool) -> None:
    """Into an engine and an optimizer that are new, or that have experts elsewhere and state already."""
    run, plain = way.run(seed=9), Plain(way)
    if used:
        run.train(20, 22)
    state = stock_state(run, options)
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    plain.train(0, 3)
    assert_same(run, plain)
    run.train(3, 6)
    plain.train(3, 6)
    assert_same(run, plain)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        (Way(), FLAT),
        (Way(experts=5, dense="replicate"), PLAIN),
        (Way(optimizer="groups", pools="layer"), FLAT),
        (Way(optimizer="Adafactor"), PLAIN),
    ],
)
def test_two_devices_to_any_number(groups: Groups, tmp_path: Path, way: Way, options: StateDictOptions) -> None:
    groups(2).run(saved, str(tmp_path), way, options)
    groups(2).run(resumed, str(tmp_path), way, options, True)
    groups(3).run(resumed, str(tmp_path), way, options, False)
    resumed(str(tmp_path), way, options, used=False)


def test_one_device_to_two(groups: Groups, tmp_path: Path) -> None:
    saved(str(tmp_path), Way(experts=5), PLAIN)
    groups(2).run(resumed, str(tmp_path), Way(experts=5), PLAIN, True)


def test_replicas_to_shards(groups: Groups, tmp_path: Path) -> None:
    way = Way(experts=5, mesh=(2, 2))
    groups(4).run(saved, str(tmp_path), way, PLAIN)
    groups(2).run(resumed, str(tmp_path), replace(way, mesh=None), PLAIN, False)


def in_memory(way: Way, broadcast: bool) -> None:
    """Whole tensors on the CPU and back: every rank has them, or rank 0 alone."""
    run, plain = way.run(), Plain(way)
    run.train(0, 3)
    plain.train(0, 3)
    state = stock_state(run, StateDictOptions(full_state_dict=True, cpu_offload=broadcast))
    again = way.run(seed=9)
    again.train(20, 22)
    again.optimizer = make_optimizer(way.optimizer, again.model)
    if broadcast and dist.get_rank() == 0:
        for key, value in plain.model.state_dict().items():
            torch.testing.assert_close(state["model"][key], value, rtol=1e-8, atol=1e-12)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(again.model, state["model"], options=options)
    set_optimizer_state_dict(again.model, again.optimizer, state["optimizer"], options=options)
    assert_same(again, plain)
    again.train(3, 6)
    plain.train(3, 6)
    assert_same(again, plain)


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("way", [Way(), Way(experts=5)])
def test_whole_tensors_in_memory(groups: Groups, way: Way, broadcast: bool) -> None:
    groups(2).run(in_memory, way, broadcast)


def saved_in_background(folder: str, way: Way) -> None:
    """`dcp.async_save` copies what it is given; the engine reads what stock DCP wrote."""
    run, plain = way.run(), Plain(way)
    run.train(0, 3)
    plain.train(0, 3)
    group = dist.new_group(backend="gloo")  # its thread must not take messages of the training's
    writing = dcp.async_save(run.model.state_dict(), checkpoint_id=folder, process_group=group)
    run.train(3, 5)
    writing.result()
    other = way.run(seed=9)
    other.train(20, 22)
    other.engine.load(folder)
    assert_same(other, plain)


@pytest.mark.parametrize("way", [Way(), Way(experts=5)])
def test_the_engine_reads_stock_checkpoints(groups: Groups, tmp_path: Path, way: Way) -> None:
    groups(2).run(saved_in_background, str(tmp_path / "saved"), way)


def of_compiled_blocks() -> None:
    """DCP takes torch.compile's part out of the keys; compiled blocks take them, checkpointed or not."""
    run, other = Way().run(), Way().run(seed=5)
    run.train(0, 3)
    wrap(run.model, "both")
    wrap(other.model, "compile")
    state = get_model_state_dict(run.model)
    assert state.keys() == run.engine.full_state_dict().keys()
    set_model_state_dict(other.model, state)
    expected = run.engine.full_state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.engine.full_state_dict().items())
    other.model.load_state_dict(other.model.state_dict())


def test_compiled_blocks(groups: Groups) -> None:
    groups(2).run(of_compiled_blocks)
