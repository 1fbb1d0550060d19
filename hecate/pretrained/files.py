"""Read and write safetensors files one tensor, or part of a tensor, at a time.

The format (github.com/huggingface/safetensors): 8 bytes for the length of the header, the header as JSON (name ->
dtype, shape, offsets), then the tensors without gaps. The library can read parts of tensors but writes only whole
files from memory; `ShardFile` writes them piece by piece.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hecate.text import listed

__all__ = ["INDEX", "SINGLE", "ShardFile", "TensorMeta", "WeightFiles", "num_bytes"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class TensorMeta:
    """Dtype and shape of a tensor in a file's header; `dtype` is the format's name, e.g. `F32` for float32."""

    dtype: str
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        if tensor.dtype not in NAMES:
            raise ValueError(f"a safetensors file holds {listed(map(str, NAMES))}, not {tensor.dtype}")
        return cls(NAMES[tensor.dtype], tensor.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


class WeightFiles:
    """The tensors in `model.safetensors`, or in the files that `model.safetensors.index.json` lists.

    Args:
        folder: the folder.
        single: name of the file that has all tensors, instead of `model.safetensors`.

    Attributes:
        tensors: key -> dtype and shape, over all files.

    Raises:
        ValueError: the folder has no such files, or a file is missing or damaged; the message names the file.
    """

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        self._folder, self._single = folder, single
        self._handles = {file: self._open(file) for file in self._files()}
        self._file_of = {key: file for file, handle in self._handles.items() for key in handle.keys()}  # noqa: SIM118
        if absent := sorted(self._listed - self._file_of.keys()):
            raise ValueError(f"{folder}: {INDEX} lists {absent[0]}, which is in none of its files")
        self.tensors = {key: self._meta(key) for key in self._file_of}

    def read(self, key: str, index: Sequence[slice] = ()) -> Tensor:
        """The part `index` of a tensor, on the CPU; without `index` all of it. Nothing else is read from disk."""
        handle = self._handles[self._file_of[key]]
        whole = all(i.start == 0 and i.stop == n for i, n in zip(index, self.tensors[key].shape, strict=False))
        try:
            return handle.get_tensor(key) if whole else handle.get_slice(key)[tuple(index)]
        except SafetensorError as error:
            raise ValueError(f"{self._folder}: file {self._file_of[key]} is damaged: {error}") from None

    def _files(self) -> list[str]:
        self._listed: set[str] = set()
        if (self._folder / self._single).exists():
            return [self._single]
        if not (self._folder / INDEX).exists():
            raise ValueError(f"{self._folder}: must be a folder with {self._single} or {INDEX}")
        try:
            weight_map = json.loads((self._folder / INDEX).read_text()).get("weight_map")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self._folder}: file {INDEX} is damaged: {error!r}") from None
        if not isinstance(weight_map, dict):
            raise ValueError(f"{self._folder}: file {INDEX} is damaged: it has no weight_map")
        self._listed = set(weight_map)
        return sorted(set(weight_map.values()))

    def _open(self, file: str) -> Any:
        if not (self._folder / file).exists():
            raise ValueError(f"{self._folder}: file {file} is missing")
        try:
            return safe_open(self._folder / file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self._folder}: file {file} is damaged: {error}") from None

    def _meta(self, key: str) -> TensorMeta:
        part = self._handles[self._file_of[key]].get_slice(key)
        return TensorMeta(part.get_dtype(), torch.Size(part.get_shape()))


def num_bytes(meta: TensorMeta) -> int:
    """Size of the tensor's values in bytes."""
    return math.prod(meta.shape) * meta.itemsize


class ShardFile:
    """A safetensors file whose tensors are known in advance, written piece by piece in any order.

    After an OSError further writes are dropped and `check` raises the error: a rank whose disk is full must still take
    part in the collectives.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorMeta]) -> None:
        self._path = path
        self._error: OSError | None = None
        self._places: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, meta in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # largest first: aligned
            header[name] = {
                "dtype": meta.dtype,
                "shape": list(meta.shape),
                "data_offsets": [end, end + num_bytes(meta)],
            }
            self._places[name] = end
            end += num_bytes(meta)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write `tensor` into the tensor `name`, at an offset of `row` times the size of `tensor`."""
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        with self._keeping_error():
            if self._error is None:
                self._file.seek(self._start + self._places[name] + row * data.nbytes)
                self._file.write(data.data)

    def close(self) -> None:
        """Flush to disk (fsync) and close."""
        with self._keeping_error(), self._file as file:
            if self._error is None:
                file.flush()
                os.fsync(file.fileno())

    def check(self) -> None:
        """Raise the first OSError, if any write failed."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def _keeping_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or OSError(error.errno, error.strerror, str(self._path))
