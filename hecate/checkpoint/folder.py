"""The folder of a checkpoint: written aside and renamed when complete, every file with a checksum.

`<path>/` holds torch.distributed.checkpoint's files, `hecate.json` (what is no tensor) and, written last,
`manifest.json` (format version, size and CRC-32 of every other file).
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "MANIFEST",
    "RECORD",
    "ChecksumWriter",
    "aside",
    "delete",
    "find",
    "prepare",
    "publish",
    "read_record",
    "replace_file",
    "replace_folder",
    "resolved",
    "sync",
    "verify",
]

FORMAT = 1
MANIFEST = "manifest.json"
RECORD = "hecate.json"
OWN = re.compile(r".*\.distcp|\.metadata|hecate\.json|manifest\.json")
"""Names of a checkpoint's files."""
BLOCK = 1 << 22

Checksums = dict[str, tuple[int, int]]
"""File name -> (bytes, CRC-32)."""


class _Stream(io.BufferedWriter):
    """A file being written, and the checksum of what was."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.num_bytes = self.checksum = 0

    def write(self, data: Buffer) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        self.num_bytes += memoryview(data).nbytes
        return super().write(data)


class _ChecksumFiles(FileSystem):
    """The file system of DCP's writer, keeping the checksums of what it writes."""

    def __init__(self) -> None:
        self.checksums: Checksums = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "wb", mode
        with _Stream(Path(path)) as stream:
            yield stream
        self.checksums[Path(path).name] = (stream.num_bytes, stream.checksum)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class ChecksumWriter(FileSystemWriter):
    """DCP's writer of files, synced to the disk; `checksums` of those that this rank wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True)
        self.fs = _ChecksumFiles()

    @property
    def checksums(self) -> Checksums:
        """Of the files that this rank has written."""
        return cast(_ChecksumFiles, self.fs).checksums


def resolved(path: Path) -> Path:
    """Where `path` leads, by whatever links: what is renamed must lie beside that, on its file system."""
    return Path(os.path.realpath(path))


def aside(path: Path) -> Path:
    """Where the checkpoint `path` is written until it is complete."""
    return path.with_name(path.name + ".tmp")


def prepare(path: Path) -> None:
    """Make an empty folder aside of `path`; what a crash left there is dropped.

    Raises:
        OSError: that is not allowed, or `path` is nothing that a folder can be put in the place of.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if os.path.ismount(path):
        raise OSError(errno.EBUSY, "a mount point cannot be replaced, save to a folder in it", str(path))
    temporary = aside(path)
    if temporary.exists():
        delete(temporary)
    temporary.mkdir(parents=True)


def delete(path: Path) -> None:
    """A folder and all that is in it, or a file or link; OSError that names `path` where something stays."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot delete {path}: {error.strerror}", error.filename) from error


def publish(temporary: Path, path: Path, record: Mapping[str, Any], checksums: Checksums) -> None:
    """Complete the checkpoint in `temporary` and put it in the place of `path`.

    A crash at any point leaves the one before at `path` or at `path.old`, where `find` looks. Other files stay.
    """
    text = json.dumps(record)
    _write(temporary / RECORD, text)
    checksums = {**checksums, RECORD: (len(text.encode()), zlib.crc32(text.encode()))}
    _write(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": checksums}, indent=1))
    replace_folder(temporary, path, keep=lambda name: OWN.fullmatch(name) is None)


def replace_folder(temporary: Path, path: Path, keep: Callable[[str], bool]) -> None:
    """Put the complete folder `temporary` in the place of `path`, which may exist.

    A crash at any point leaves the one before at `path` or at `path.old`, and the new one at `path` or `temporary`;
    what is kept lies in `path.old` until it is moved, which the next call makes up for.

    Args:
        temporary: of the same file system.
        path: what lies there is deleted.
        keep: which of it, by name, is moved to the new folder instead.
    """
    sync(temporary)
    old = _old(path)
    if path.exists():
        _drop(old, path, keep)
        os.rename(path, old)
    os.rename(temporary, path)
    sync(path.parent)
    _drop(old, path, keep)


def replace_file(path: Path, text: str) -> None:
    """Write `path` at once: a crash, of the machine too, leaves the old one or the new one."""
    partial = path.with_name(path.name + ".part")
    _write(partial, text)
    os.replace(partial, path)
    sync(path.parent)


def _drop(old: Path, path: Path, keep: Callable[[str], bool]) -> None:
    """Delete the folder `old`, if there is one, after moving what is kept and not there yet to `path`."""
    if not old.exists():
        return
    for entry in list(old.iterdir()):
        if keep(entry.name) and not (path / entry.name).exists():
            os.rename(entry, path / entry.name)
    delete(old)


def find(path: Path) -> Path:
    """Where the checkpoint `path` is: there, or aside where saving its successor was interrupted. ValueError if not."""
    for folder in (path, _old(resolved(path))):
        if (folder / MANIFEST).exists() or (folder / ".metadata").exists():
            return folder
    raise ValueError(f"checkpoint {path}: no such checkpoint; it must be a folder with {MANIFEST} or .metadata")


def verify(folder: Path, rank: int, world: int) -> None:
    """Check the files of a checkpoint, each of `world` ranks its part.

    Raises:
        ValueError: it is of a newer format, or a file is missing or damaged; names the file.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / RECORD).exists():
            raise ValueError(f"checkpoint {folder}: {MANIFEST} is missing, the checkpoint is damaged")
        return  # of another program, without checksums
    manifest = _parse(folder / MANIFEST)
    if not manifest.keys() >= {"format", "files"}:
        raise ValueError(f"checkpoint {folder}: file {MANIFEST} is damaged: it has no format or no files")
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"checkpoint {folder}: has format {manifest['format']}, this version of hecate reads up to {FORMAT}; "
            "load it with a newer one"
        )
    for name in sorted(manifest["files"])[rank::world]:
        expected = tuple(manifest["files"][name])
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder}: file {name} is missing")
        if (found := _checksum(folder / name)) != expected:
            raise ValueError(
                f"checkpoint {folder}: file {name} is damaged: {found[0]} bytes with CRC-32 {found[1]:08x}, "
                f"written were {expected[0]} with {expected[1]:08x}"
            )


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `publish` was given; None in a checkpoint of another program."""
    return _parse(folder / RECORD) if (folder / RECORD).is_file() else None


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"checkpoint {path.parent}: file {path.name} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path.parent}: file {path.name} is damaged: it holds no mapping")
    return content


def _checksum(path: Path) -> tuple[int, int]:
    num_bytes = checksum = 0
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
            num_bytes += count
    return num_bytes, checksum


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file, or renames and new files in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
