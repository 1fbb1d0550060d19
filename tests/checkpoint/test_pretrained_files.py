"""safetensors reads what `ShardFile` writes piece by piece, and `WeightFiles` reads parts of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hecate.pretrained.files import SINGLE, ShardFile, TensorMeta, WeightFiles

TENSORS = {
    "odd": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3, 2).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "stack": torch.randn(4, 3, 2),
    "long": torch.arange(7),
    "transposed": torch.randn(5, 3).T,
}


def write(path: Path) -> None:
    file = ShardFile(path, {name: TensorMeta.of(tensor) for name, tensor in TENSORS.items()})
    for row in (2, 0, 3, 1):
        file.write("stack", TENSORS["stack"][row], row)
    for name in reversed(TENSORS):
        if name != "stack":
            file.write(name, TENSORS[name])
    file.close()
    file.check()


def test_written_piece_by_piece_in_any_order(tmp_path: Path) -> None:
    write(tmp_path / SINGLE)
    found = load_file(tmp_path / SINGLE)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    write(tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("stack", (slice(1, 3), slice(0, 3), slice(0, 2))),
        ("stack", (slice(2, 2), slice(0, 3), slice(0, 2))),
        ("scalar", ()),
    ],
)
def test_a_part_is_read(tmp_path: Path, name: str, index: tuple[slice, ...]) -> None:
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / SINGLE)
    found: Tensor = WeightFiles(tmp_path).read(name, index)
    assert torch.equal(found, TENSORS[name][index])


def test_a_dtype_that_files_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"not torch\.complex64"):
        TensorMeta.of(torch.zeros(1, dtype=torch.complex64))
