"""Loading an untrusted checkpoint folder runs no code from it and reads nothing outside it."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from hecate.checkpoint.metadata import read_metadata
from hecate.checkpoint.rows import ExpertsLoadPlanner
from tests.checkpoint.forge import forge, forge_metadata
from tests.checkpoint.runs import Run, plain_model
from tests.checkpoint.states import assert_refused
from tests.workers import Groups

WEIGHT = "tokens.weight"


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def makes(mark: Path) -> Code:
    return Code(os.system, f"touch {mark}")


def dcp_save(path: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=path, no_dist=True)


# Metadata.


def pickles(mark: Path) -> dict[str, bytes]:
    """Ways in which `.metadata` could run code or change classes."""
    spoil = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x01\x00\x00\x00xK\x01s\x86b."
    return {
        "command": pickle.dumps(makes(mark)),
        "eval": pickle.dumps(Code(eval, f"__import__('os').system('touch {mark}')")),
        "getattr": b"cbuiltins\ngetattr\n.",
        "torch.load": b"ctorch\nload\n(X\x01\x00\x00\x00xtR.",
        "name with dots": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
        "inside": pickle.dumps(Metadata({"a": makes(mark)})),  # type: ignore[dict-item]
        "as planner data": pickle.dumps(Metadata({}, planner_data=makes(mark))),
        "attributes of a class": spoil,
        "not a pickle": b"no",
        "nothing": b"",
        "another type": pickle.dumps([1, 2]),
        "deep": b"(" * 100 + b"]" * 1000 + b".",
    }


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("way", pickles(Path()))
def test_metadata_runs_nothing(checkpoint: Path, tmp_path: Path, way: str, manifest: bool) -> None:
    mark = tmp_path / "pwned"
    if not manifest:
        (checkpoint / "manifest.json").unlink()
        (checkpoint / "hecate.json").unlink()
    forge(checkpoint, ".metadata", pickles(mark)[way])
    before = dict(vars(Metadata))
    assert_refused(Run(), checkpoint, r"file \.metadata is damaged or refused")
    assert not mark.exists()
    assert dict(vars(Metadata)) == before


def test_the_pickles_are_real(tmp_path: Path) -> None:
    """Standard unpickling runs the command, and lets the class be changed."""
    mark = tmp_path / "pwned"
    pickle.loads(pickles(mark)["command"])
    assert mark.exists()
    pickle.loads(pickles(mark)["attributes of a class"])
    assert Metadata.x == 1  # type: ignore[attr-defined]
    del Metadata.x  # type: ignore[attr-defined]


def error_of_load(path: str) -> str:
    with pytest.raises(ValueError, match="refused") as error:
        Run().engine.load(path)
    return str(error.value)


def test_no_rank_runs_it(groups: Groups, checkpoint: Path, tmp_path: Path) -> None:
    forge(checkpoint, ".metadata", pickles(tmp_path / "pwned")["command"])
    for error in groups(2).run(error_of_load, str(checkpoint)):
        assert "it names posix.system, which is no class that torch.distributed.checkpoint writes" in error
    assert not (tmp_path / "pwned").exists()


STATE = {
    "scalar": torch.tensor(3.0),
    "half": torch.ones(2, 3, dtype=torch.bfloat16),
    "list": [torch.arange(4), {"deep": torch.ones(1, dtype=torch.bool)}],
    "plain": OrderedDict(step=5, name="x"),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "complex": torch.ones(2, dtype=torch.complex64),
    "empty": torch.empty(0, 5),
}


@pytest.mark.parametrize("ours", [True, False])
def test_metadata_is_what_dcp_reads(saved: Path, tmp_path: Path, ours: bool) -> None:
    path = saved
    if not ours:
        path = tmp_path / "stock"
        dcp_save(path, STATE)
    expected, found = dcp.FileSystemReader(path).read_metadata(), read_metadata(path)
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    for entry in found.state_dict_metadata.values():
        assert type(entry) in (TensorStorageMetadata, BytesStorageMetadata)
        assert isinstance(entry, BytesStorageMetadata) or type(entry.size) is torch.Size


def test_all_dtypes(tmp_path: Path) -> None:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    for dtype in sorted(found, key=str):
        properties = dcp_metadata.TensorProperties(dtype=dtype)
        entry = TensorStorageMetadata(properties, torch.Size([1]), [])
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": entry}, storage_data={})))
        assert read_metadata(tmp_path).state_dict_metadata == {"a": entry}


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: setattr(metadata, "state_dict_metadata", [1]),
        lambda metadata: setattr(metadata, "storage_data", None),
        lambda metadata: metadata.state_dict_metadata.update({3: BytesStorageMetadata()}),
        lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "size", (2.0, 3)),
        lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "size", (-2, 3)),
        lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "chunks", None),
        lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "chunks", [3]),
        lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT].properties, "dtype", "float64"),
        lambda metadata: metadata.storage_data.update({"a": "b"}),
        lambda metadata: setattr(metadata.storage_data[MetadataIndex(WEIGHT, (0, 0))], "offset", -1),
        lambda metadata: setattr(metadata.storage_data[MetadataIndex(WEIGHT, (0, 0))], "relative_path", 3),
    ],
)
def test_metadata_of_wrong_types(checkpoint: Path, change: Callable[[Metadata], None]) -> None:
    forge_metadata(checkpoint, change)
    assert_refused(Run(), checkpoint, r"file \.metadata is damaged or refused")


# Files.


def move_weight(checkpoint: Path, path: str) -> None:
    """Change the metadata so that a weight is stored at that path."""

    def change(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex(WEIGHT, (0, 0))].relative_path = path

    forge_metadata(checkpoint, change)


@pytest.mark.parametrize("where", ["absolute", "..", "link", "folder behind a link"])
def test_paths_that_leave_the_folder(checkpoint: Path, tmp_path: Path, where: str) -> None:
    """Refused although the file is valid. There is no manifest, since that would not list the file."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(checkpoint / "__0_0.distcp", outside / "file")
    (checkpoint / "link").symlink_to(outside / "file")
    (checkpoint / "folder").symlink_to(outside)
    path = {
        "absolute": str(outside / "file"),
        "..": "../outside/file",
        "link": "link",
        "folder behind a link": "folder/file",
    }[where]
    move_weight(checkpoint, path)
    assert_refused(Run(), checkpoint, "names files that manifest.json does not")
    stock = without_manifest(checkpoint)
    move_weight(stock, path)
    with pytest.raises(ValueError, match=f"file {path} leads out of the folder, which is refused"):
        Run().engine.load(stock)
    move_weight(stock, "__0_0.distcp")
    Run().engine.load(stock)


def without_manifest(checkpoint: Path) -> Path:
    """The same weights, as `dcp.save` writes them."""
    stock = checkpoint.parent / "stock"
    dcp_save(stock, plain_model().state_dict())
    for name in ("link", "folder"):
        (stock / name).symlink_to(os.readlink(checkpoint / name))
    return stock


def test_file_that_is_none(tmp_path: Path) -> None:
    dcp_save(tmp_path / "stock", plain_model().state_dict())
    os.mkfifo(tmp_path / "stock" / "pipe")
    for name in ("pipe", "nothing", "."):
        move_weight(tmp_path / "stock", name)
        with pytest.raises(ValueError, match=f"file {name} is missing"):
            Run().engine.load(tmp_path / "stock")


def test_transforms_are_refused(checkpoint: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex(WEIGHT, (0, 0))].transform_descriptors = ["stream.zstd"]

    forge_metadata(checkpoint, change)
    assert_refused(Run(), checkpoint, f"{WEIGHT} at .* is stored by stream.zstd, which is not supported")


def tensor_file(mark: Path, legacy: bool) -> bytes:
    """Code beside a tensor, as `torch.save` writes it; larger than the weight."""
    file = io.BytesIO()
    torch.save([makes(mark), torch.zeros(1000, dtype=torch.float64)], file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@pytest.mark.parametrize("legacy", [True, False])
def test_tensor_file_runs_nothing(checkpoint: Path, tmp_path: Path, legacy: bool) -> None:
    """Code in the place of a tensor, with sizes and checksums that fit."""
    mark, path = tmp_path / "pwned", checkpoint / "__0_0.distcp"
    data = tensor_file(mark, legacy)

    def change(metadata: Metadata) -> None:
        info = metadata.storage_data[MetadataIndex(WEIGHT, (0, 0))]
        info.offset, info.length = path.stat().st_size, len(data)

    forge_metadata(checkpoint, change)
    forge(checkpoint, path.name, path.read_bytes() + data)
    with pytest.raises(OSError, match=r"Weights only load failed"):
        Run().engine.load(checkpoint)
    assert not mark.exists()
    torch.load(io.BytesIO(data), weights_only=False)
    assert mark.exists()


# Entries stored as bytes, which DCP unpickles.


@pytest.mark.parametrize(
    "name",
    [
        WEIGHT,
        "blocks.0.moe.experts.up",
        f"optimizer.state.{WEIGHT}.exp_avg",
        f"optimizer.state.{WEIGHT}.more",
        "hecate.blocks.0.moe.experts.owners",
    ],
)
def test_entry_as_bytes(checkpoint: Path, name: str) -> None:
    forge_metadata(checkpoint, lambda metadata: metadata.state_dict_metadata.update({name: BytesStorageMetadata()}))
    assert_refused(Run(), checkpoint, f"{name} is stored as pickled bytes, which are not read; it must be a tensor")


@pytest.mark.parametrize("name", [WEIGHT, "blocks.0.moe.experts.up"])
def test_stock_checkpoint_with_a_weight_as_bytes(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "pwned"
    dcp_save(tmp_path / "stock", plain_model().state_dict() | {name: makes(mark)})
    run = Run()
    before = run.engine.full_state_dict()
    with pytest.raises(ValueError, match=f"{name} is stored as pickled bytes"):
        run.engine.load(tmp_path / "stock")
    assert all(torch.equal(value, before[key]) for key, value in run.engine.full_state_dict().items())
    assert not mark.exists()


def test_bytes_that_nobody_asked_for_are_left_alone(tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    dcp_save(tmp_path / "stock", plain_model(seed=3).state_dict() | {"scheduler": makes(mark), "step": 3})
    run = Run()
    run.engine.load(tmp_path / "stock")
    expected = plain_model(seed=3).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in run.engine.full_state_dict().items())
    assert not mark.exists()


def test_load_planner_takes_no_bytes(tmp_path: Path) -> None:
    planner, index = ExpertsLoadPlanner(), MetadataIndex("it")
    item = ReadItem(LoadItemType.BYTE_IO, index, torch.Size([0]), index, torch.Size([0]), torch.Size([1]))
    with pytest.raises(ValueError, match="it is stored as pickled bytes"):
        planner.load_bytes(item, io.BytesIO(pickle.dumps(makes(tmp_path / "pwned"))))
    assert not (tmp_path / "pwned").exists()
