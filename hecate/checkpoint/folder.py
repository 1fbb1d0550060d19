"""The folder of a checkpoint: written under a temporary name and renamed when complete; every file has a checksum.

`<path>/` holds torch.distributed.checkpoint's files, `hecate.json` (everything that is not a tensor) and, written
last, `manifest.json`, see `hecate.checkpoint.manifest`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hecate.checkpoint.manifest import MANIFEST, METADATA, RECORD, Files, manifest_text, proof_of_text

__all__ = [
    "MANIFEST",
    "RECORD",
    "aside",
    "delete",
    "find",
    "prepare",
    "publish",
    "replace_file",
    "replace_folder",
    "resolved",
    "sync",
]

OWN = re.compile(r".*\.distcp|\.metadata|hecate\.json|manifest\.json")
"""Matches the names of a checkpoint's own files."""


def resolved(path: Path) -> Path:
    """`path` with symbolic links resolved: temporary folders must be on the target's file system to be renamed."""
    return Path(os.path.realpath(path))


def aside(path: Path) -> Path:
    """Temporary folder in which the checkpoint `path` is written until it is complete."""
    return path.with_name(path.name + ".tmp")


def prepare(path: Path) -> None:
    """Make the empty temporary folder for `path`; leftovers of a crash are deleted.

    Raises:
        OSError: the folder cannot be made, or `path` is a file or a mount point, which a folder cannot replace.
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
    """Delete a folder with its contents, a file or a link; OSError that names `path` if something cannot be deleted."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot delete {path}: {error.strerror}", error.filename) from error


def publish(temporary: Path, path: Path, record: Mapping[str, Any], files: Files, sha256: bool) -> None:
    """Complete the checkpoint in `temporary`, whose `files` are already written, and move it to `path`.

    A crash at any point leaves the previous checkpoint at `path` or `path.old`, where `find` looks. Files in `path`
    that are not part of a checkpoint are kept.

    Raises:
        OSError: a file is missing or does not have the size it was written with, or a file cannot be written.
    """
    for name, proof in files.items():
        written = temporary / name
        if not written.is_file() or written.stat().st_size != proof.num_bytes:
            raise OSError(
                f"{written}, written with {proof.num_bytes} bytes, is not like that on rank 0; a checkpoint must be "
                "saved to a file system that all ranks share"
            )
    text = json.dumps(record)
    _write(temporary / RECORD, text)
    _write(temporary / MANIFEST, manifest_text({**files, RECORD: proof_of_text(text, sha256)}))
    replace_folder(temporary, path, keep=lambda name: OWN.fullmatch(name) is None)


def replace_folder(temporary: Path, path: Path, keep: Callable[[str], bool]) -> None:
    """Replace `path`, which may exist, by the complete folder `temporary`.

    A crash at any point leaves the previous folder at `path` or `path.old`, and the new one at `path` or `temporary`.
    Entries to keep stay in `path.old` until they are moved; if a crash prevents that, the next call moves them.

    Args:
        temporary: folder on the same file system as `path`.
        path: folder to replace; its entries are deleted unless `keep` selects them.
        keep: whether the entry of that name is moved to the new folder instead.
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
    """Write `path` atomically: an error or a crash, even of the machine, leaves either the old content or the new."""
    partial = path.with_name(path.name + ".part")
    try:
        _write(partial, text)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # it may not be there
            partial.unlink()
        raise
    sync(path.parent)


def _drop(old: Path, path: Path, keep: Callable[[str], bool]) -> None:
    """Delete the folder `old`, if it exists, after moving entries to keep to `path` unless `path` has them already."""
    if not old.exists():
        return
    for entry in list(old.iterdir()):
        if keep(entry.name) and not (path / entry.name).exists():
            os.rename(entry, path / entry.name)
    delete(old)


def find(path: Path) -> Path:
    """Folder of the checkpoint `path`: `path`, or `path.old` if replacing it was interrupted. ValueError if neither."""
    for folder in (path, _old(resolved(path))):
        if (folder / MANIFEST).exists() or (folder / METADATA).exists():
            return folder
    raise ValueError(f"checkpoint {path}: no such checkpoint; it must be a folder with {MANIFEST} or .metadata")


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Sync a file to disk (fsync), or a folder, so that renames and new files in it survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
