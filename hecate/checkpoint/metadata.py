"""Read the `.metadata` file of torch.distributed.checkpoint (DCP) without running code from it.

DCP writes it as a pickle and reads it with `pickle.load`, which runs any code in a folder from an untrusted source.
Here the unpickler gets a stand-in class, made anew for each read, for every class that DCP writes, and refuses any
other name. The values of the stand-ins are then type-checked and converted to DCP's own classes. The unpickler never
gets DCP's classes themselves, because a pickle can also set attributes of the classes that it names.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from hecate.checkpoint.manifest import METADATA, file_of

__all__ = ["CheckedReader", "read_metadata"]

METADATA_MODULE = "torch.distributed.checkpoint.metadata"
STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"


class CheckedReader(dcp.FileSystemReader):
    """DCP's reader, using metadata that was read and checked beforehand."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checked metadata; the folder's file is not read again."""
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """The metadata of the checkpoint in `folder`, as DCP's own classes.

    Raises:
        ValueError: the file is damaged or holds anything other than DCP metadata.
        OSError: the file cannot be read.
    """
    data = file_of(folder, METADATA).read_bytes()
    try:
        return _metadata(_Unpickler(data).load())
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise ValueError(f"checkpoint {folder}: file {METADATA} is damaged or refused: {error}") from error


class _Plain:
    """Base of the stand-in classes: holds the attributes that the pickle sets."""


def _stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """(module, name) of each class that DCP writes -> its stand-in. New each time: a pickle may modify them."""
    plain = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex")
    found: dict[tuple[str, str], Callable[..., Any]] = {
        (METADATA_MODULE, name): type(name, (_Plain,), {}) for name in (*plain, "StorageMeta")
    }
    found[STORAGE_MODULE, "_StorageInfo"] = type("_StorageInfo", (_Plain,), {})

    def set_state(self: Any, state: Any) -> None:
        self.dtype = state[0]  # the other properties are deprecated

    found[METADATA_MODULE, "TensorProperties"] = type("TensorProperties", (_Plain,), {"__setstate__": set_state})
    # The pickle also calls these (memory format, layout, path of the saved folder); their results are not used.
    unused = (
        (METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    )
    found |= {name: lambda *values: None for name in unused}
    return found | {("torch", "Size"): lambda values: tuple(values), ("collections", "OrderedDict"): dict}


class _Unpickler(pickle.Unpickler):
    """Unpickler that accepts only the names in `_stand_ins` and torch dtypes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        """ValueError if DCP does not write that name."""
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise ValueError(f"it names {module}.{name}, which is no class that torch.distributed.checkpoint writes")


# From stand-ins to DCP's classes.


def _metadata(found: Any) -> Metadata:
    tensors = {_text(name): _storage(name, value) for name, value in _mapping(_get(found, "state_dict_metadata"))}
    storage = {_index(key): _info(key, value) for key, value in _mapping(_get(found, "storage_data"))}
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())


def _storage(name: str, found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(found).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    dtype = _get(_get(found, "properties"), "dtype")
    _require(isinstance(dtype, torch.dtype), name, dtype)
    chunks = _get(found, "chunks")
    _require(isinstance(chunks, list), name, chunks)
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(name, _get(found, "size")),
        [ChunkStorageMetadata(_size(name, _get(c, "offsets")), _size(name, _get(c, "sizes"))) for c in chunks],
    )


def _index(found: Any) -> MetadataIndex:
    name, offset = _text(_get(found, "fqn")), _get(found, "offset", None)
    return MetadataIndex(name, None if offset is None else _size(name, offset))


def _info(key: Any, found: Any) -> _StorageInfo:
    name = _get(key, "fqn")
    offset, length = _size(name, (_get(found, "offset"), _get(found, "length")))
    transforms = _get(found, "transform_descriptors", None) or ()
    return _StorageInfo(_text(_get(found, "relative_path")), offset, length, [_text(t) for t in transforms] or None)


def _size(name: str, values: Any) -> torch.Size:
    right = isinstance(values, tuple) and all(type(v) is int and 0 <= v < 2**63 for v in values)
    _require(right, name, values)
    return torch.Size(values)


def _text(value: Any) -> str:
    _require(isinstance(value, str), "a name", value)
    return value


def _mapping(value: Any) -> list[tuple[Any, Any]]:
    _require(isinstance(value, Mapping), "a mapping", value)
    return list(value.items())


_NONE_GIVEN = object()


def _get(found: Any, name: str, default: Any = _NONE_GIVEN) -> Any:
    """Attribute `name` that the pickle gave the stand-in `found`; ValueError if none and there is no default."""
    _require(isinstance(found, _Plain), name, found)
    value = vars(found).get(name, default)
    _require(value is not _NONE_GIVEN, name, "nothing")
    return value


def _require(right: bool, name: str, value: Any) -> None:
    if not right:
        raise ValueError(f"{name} holds {str(value)[:100]}, which torch.distributed.checkpoint does not write")
