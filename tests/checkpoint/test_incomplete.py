"""A checkpoint that lacks part of a tensor, or has impossible contents, is refused before anything changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

import hecate
from hecate.checkpoint.state import TrainingState
from hecate.checkpoint.writer import ProvingWriter
from tests.checkpoint.forge import forge, forge_metadata
from tests.checkpoint.runs import Run
from tests.checkpoint.states import assert_like, assert_refused
from tests.workers import Groups


def refused(path: Path, match: str) -> None:
    run = Run(seed=7)
    run.train(5, 6)
    assert_refused(run, path, match)


EXPERTS, DENSE, STEP = "blocks.1.moe.experts.up", "tokens.weight", "optimizer.state.tokens.weight.step"
EVERY_KIND = (
    EXPERTS,
    DENSE,
    f"optimizer.state.{EXPERTS}.exp_avg",
    f"optimizer.state.{DENSE}.exp_avg_sq",
    STEP,
    "hecate.blocks.0.moe.experts.owners",
    "hecate.blocks.0.moe.experts.replica0.history",
    "hecate.blocks.0.moe.experts.replica0.slots",
)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_missing_chunk(checkpoint: Path, name: str) -> None:
    forge_metadata(checkpoint, lambda metadata: metadata.state_dict_metadata[name].chunks.pop())
    refused(checkpoint, f"{name}: .* elements are in no chunk, the checkpoint is incomplete")


@pytest.mark.parametrize("name", EVERY_KIND)
def test_chunk_in_no_file(checkpoint: Path, name: str) -> None:
    def change(metadata: Metadata) -> None:
        chunk = metadata.state_dict_metadata[name].chunks[-1]
        del metadata.storage_data[MetadataIndex(name, chunk.offsets)]

    forge_metadata(checkpoint, change)
    refused(checkpoint, f"the chunk of {name} at .* is in no file")


@pytest.mark.parametrize("name", [EXPERTS, STEP])
def test_chunk_twice(checkpoint: Path, name: str) -> None:
    def change(metadata: Metadata) -> None:
        chunks = metadata.state_dict_metadata[name].chunks
        chunks.append(chunks[0])

    forge_metadata(checkpoint, change)
    refused(checkpoint, f"{name}: .* overlap")


def test_chunk_outside_of_its_file(checkpoint: Path) -> None:
    def move(metadata: Metadata, **changes: int) -> None:
        info = metadata.storage_data[MetadataIndex(DENSE, (0, 0))]
        for key, value in changes.items():
            setattr(info, key, value)

    forge_metadata(checkpoint, lambda metadata: move(metadata, offset=10**9))
    refused(checkpoint, f"chunk of {DENSE} .* is said to be bytes 1000000000 to .* which has ")
    forge_metadata(checkpoint, lambda metadata: move(metadata, offset=0, length=100))
    refused(checkpoint, f"chunk of {DENSE} .* is said to be bytes 0 to 100 of ")


# The history may have any number of steps, the optimizer's state any shape.
@pytest.mark.parametrize(
    "name", ["hecate.blocks.0.moe.experts.replica0.history", "optimizer.state.tokens.weight.exp_avg"]
)
def test_shape_that_no_file_can_hold(checkpoint: Path, name: str) -> None:
    forge_metadata(checkpoint, lambda metadata: _grow(metadata, name, 2**45))
    refused(checkpoint, f"chunk of {name} .* bytes, is said to be bytes")


def _grow(metadata: Metadata, name: str, rows: int) -> None:
    entry = metadata.state_dict_metadata[name]
    entry.size = torch.Size((rows, *entry.size[1:]))
    entry.chunks = entry.chunks[:1]
    entry.chunks[0].sizes = entry.size


@pytest.mark.parametrize("key", ["owners", "replica0.history", "replica0.since_reshard", "replica0.slots"])
def test_planner_entry_that_lacks(checkpoint: Path, key: str) -> None:
    name = f"hecate.blocks.1.moe.experts.{key}"
    forge_metadata(checkpoint, lambda metadata: metadata.state_dict_metadata.pop(name))
    refused(checkpoint, f"lacks {name}, of the planner of blocks.1.moe.experts")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("owners", torch.full((8,), 1), r"has values from 1 to 1; must be within \[0, 0\]"),
        ("owners", torch.full((8,), -1), "has values from -1 to -1"),
        ("owners", torch.zeros(7, dtype=torch.int64), r"has shape \(7,\), torch.int64; must be \(8,\), torch.int64"),
        ("owners", torch.zeros(8), r"has shape \(8,\), torch.float32; must be"),
        ("replica0.history", torch.zeros(2, 3, 8, dtype=torch.int64), r"must be \(any, 1, 8\)"),
        ("replica0.history", torch.full((1, 1, 8), -3), "has values from -3 to -3"),
        ("replica0.since_reshard", torch.full((8,), 2**62), "must be within"),
        ("replica0.tokens_per_device", torch.tensor(-1), "must be within"),
        ("replica0.slots", torch.tensor(-1), "must be within"),
        ("replica0.slots", torch.tensor([1]), r"must be \(\)"),
    ],
)
def test_planner_entry_that_cannot_be(tmp_path: Path, key: str, value: Tensor, match: str) -> None:
    name, planner = f"hecate.blocks.1.moe.experts.{key}", TrainingState.plans
    run = Run()
    with patch.object(TrainingState, "plans", lambda state: planner(state) | {name: value}):
        run.engine.save(tmp_path / "wrong")
    with pytest.raises(ValueError, match=match) as error:
        Run(seed=7).engine.load(tmp_path / "wrong")
    assert name in str(error.value)


def test_no_more_room_for_copies_than_experts(tmp_path: Path) -> None:
    run, planner = Run(), TrainingState.plans
    many = {f"hecate.blocks.{i}.moe.experts.replica0.slots": torch.tensor(10**9) for i in range(3)}
    with patch.object(TrainingState, "plans", lambda state: planner(state) | many):
        run.engine.save(tmp_path / "many")
    run = Run(hecate.FSSDPConfig(memory_slots="auto"))
    for layer in run.engine._engine.layers:
        layer.experts.memory_slots = 1  # one device takes none
    run.engine.load(tmp_path / "many")
    assert [layer.experts.memory_slots for layer in run.engine._engine.layers] == [8, 8, 8]


def test_optimizer_state_of_other_experts(checkpoint: Path) -> None:
    name = f"optimizer.state.{EXPERTS}.exp_avg"
    forge_metadata(checkpoint, lambda metadata: _grow(metadata, name, 9))
    refused(checkpoint, r"exp_avg of blocks.1.moe.experts.up has shape \(9, .* the 8 experts")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mesh": ["cpu", 1]}, "mesh"),
        ({"mesh": ["cpu", 0, 1]}, "mesh"),
        ({"mesh": ["cpu", True, 1]}, "mesh"),
        ({"step": -1}, "step=-1"),
        ({"step": "2"}, "step=2"),
        ({"cost": {"flops": 3}, "step": 1.5}, "step=1.5"),
        ({"cost": {"flops": -3}}, "flops=-3"),
        ({"cost": {"speed": 3}}, "speed"),
        ({"cost": None}, "cost"),
        ({"extra": [1]}, "extra"),
        ({"optimizer": 3}, "optimizer=3"),
        ({"optimizer": {"groups": {}, "scalars": {}}}, "optimizer.groups"),
        ({"optimizer": {"groups": [{"names": [3], "values": {}}], "scalars": {}}}, "optimizer.groups"),
        ({"optimizer": {"groups": [], "scalars": {"a": 3}}}, "optimizer.scalars"),
    ],
)
def test_record_of_wrong_types(checkpoint: Path, change: dict[str, Any], match: str) -> None:
    record = json.loads((checkpoint / "hecate.json").read_text())
    forge(checkpoint, "hecate.json", json.dumps(record | change).encode())
    refused(checkpoint, f"file hecate.json is damaged: .*{match}")


# A save proves that all is there.


def save_with(path: str, change: str) -> str:
    """The error of a second save in which rank 1 fails unnoticed; the first checkpoint is kept."""
    run = Run()
    run.train(0, 1)
    run.engine.save(path, run.optimizer)
    run.train(1, 2)
    with patch.object(ProvingWriter, "write_data", WRONG[change]), pytest.raises((OSError, ValueError)) as error:
        run.engine.save(path, run.optimizer)
    run.engine.save(path + " again", run.optimizer)
    return f"{type(error.value).__name__}: {error.value}"


def _less(writer: Any, plan: Any, planner: Any) -> Any:
    """Write all files, but do not report the last chunk."""
    done = FileSystemWriter.write_data(writer, plan, planner)
    if writer.rank == 1:
        done.value().pop()
    return done


def _no_file(writer: Any, plan: Any, planner: Any) -> Any:
    """Remove rank 1's file after writing it, as if that rank wrote to a disk of its own."""
    done = FileSystemWriter.write_data(writer, plan, planner)
    if writer.rank == 1:
        (writer.folder / "__1_0.distcp").unlink()
    return done


def _short_file(writer: Any, plan: Any, planner: Any) -> Any:
    done = FileSystemWriter.write_data(writer, plan, planner)
    if writer.rank == 1:
        path = writer.folder / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-1])
    return done


WRONG: dict[str, Callable[..., Any]] = {"less": _less, "no file": _no_file, "short file": _short_file}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("less", "ValueError: FSSDP.save.*is in no file"),
        ("no file", "OSError: .*__1_0.distcp, .* must be saved to a file system that all ranks share"),
        ("short file", "OSError: .*__1_0.distcp, written with .* bytes, is not like that on rank 0"),
    ],
)
def test_save_without_the_proof_of_a_rank(groups: Groups, tmp_path: Path, change: str, match: str) -> None:
    errors = groups(2).run(save_with, str(tmp_path / "checkpoint"), change)
    assert errors[0] == errors[1]
    assert re.match(match, errors[0]), errors[0]
    run = Run()
    run.engine.load(tmp_path / "checkpoint", run.optimizer)
    assert run.engine.stats()["step"] == 1
    run.engine.load(tmp_path / "checkpoint again", run.optimizer)
    assert run.engine.stats()["step"] == 2
    assert_like(tmp_path / "checkpoint again", tmp_path / "checkpoint again")
