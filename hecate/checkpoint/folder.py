"""The folder of a checkpoint: written aside and renamed when complete, every file with a checksum.

`<path>/` holds torch.distributed.checkpoint's files, `hecate.json` (what is no tensor) and, written last,
`manifest.json`, see `hecate.checkpoint.manifest`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
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
"""Names of a checkpoint's files."""


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


def publish(temporary: Path, path: Path, record: Mapping[str, Any], files: Files, sha256: bool) -> None:
    """Complete the checkpoint in `temporary`, of which `files` are written, and put it in the place of `path`.

    A crash at any point leaves the one before at `path` or at `path.old`, where `find` looks. Other files stay.

    Raises:
        OSError: a file is not there as it was written, or cannot be.
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
    """Make a file, or renames and new files in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
