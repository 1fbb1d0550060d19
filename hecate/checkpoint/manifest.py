"""The manifest of a checkpoint: format version, and size and checksums of every other file.

`manifest.json` is `{"format": 2, "files": {name: [bytes, CRC-32] or [bytes, CRC-32, SHA-256]}, "digest": ...}`; the
digest is the SHA-256 of the rest in a canonical form. Format 1 had no digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "MANIFEST",
    "METADATA",
    "RECORD",
    "FileProof",
    "Files",
    "digest_of",
    "file_of",
    "manifest_text",
    "proof_of_text",
    "read_files",
    "read_record",
    "verify",
]

FORMAT = 2
MANIFEST = "manifest.json"
RECORD = "hecate.json"
METADATA = ".metadata"
BLOCK = 1 << 22


@dataclass(frozen=True)
class FileProof:
    """Expected size and checksums of a file.

    Attributes:
        num_bytes: size of the file.
        crc32: CRC-32, which detects accidental damage.
        sha256: SHA-256 in hexadecimal digits, which also detects deliberate changes; None if not requested.
    """

    num_bytes: int
    crc32: int
    sha256: str | None = None

    def __str__(self) -> str:
        digest = "" if self.sha256 is None else f" and SHA-256 {self.sha256}"
        return f"{self.num_bytes} bytes with CRC-32 {self.crc32:08x}{digest}"

    def as_list(self) -> list[Any]:
        """The list that represents it in the manifest."""
        return [value for value in astuple(self) if value is not None]


Files = Mapping[str, FileProof]
"""File name -> its expected size and checksums."""


def manifest_text(files: Files) -> str:
    """Content of `manifest.json`."""
    content = {"format": FORMAT, "files": {name: proof.as_list() for name, proof in files.items()}}
    return json.dumps({**content, "digest": digest_of(content)}, indent=1)


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content except its "digest", in canonical form: formatting does not change it."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def proof_of_text(text: str, sha256: bool) -> FileProof:
    """Size and checksums of a file whose content is `text`."""
    data = text.encode()
    return FileProof(len(data), zlib.crc32(data), hashlib.sha256(data).hexdigest() if sha256 else None)


def read_files(folder: Path) -> Files | None:
    """The files listed in the manifest; None for a checkpoint of another program, which has no manifest.

    Raises:
        ValueError: the manifest is damaged, of a newer format, or missing although `hecate.json` exists.
        OSError: the manifest cannot be read.
    """
    if not (folder / MANIFEST).exists():
        if (folder / RECORD).exists():
            raise ValueError(f"checkpoint {folder}: {MANIFEST} is missing, the checkpoint is damaged")
        return None
    content = _read_json(folder, MANIFEST)
    where = f"checkpoint {folder}: file {MANIFEST}"
    if not content.keys() >= {"format", "files"} or type(content["format"]) is not int:
        raise ValueError(f"{where} is damaged: it has no format or no files")
    if content["format"] > FORMAT:
        raise ValueError(
            f"{where} has format {content['format']}, this version of hecate reads up to {FORMAT}; load it with a "
            "newer one, or it is damaged"
        )
    if content["format"] < 1 or (content["format"] > 1 and content.get("digest") != digest_of(content)):
        raise ValueError(f"{where} is damaged: its content has another digest than it says")
    return _parsed(where, content["files"])


def _parsed(where: str, files: Any) -> Files:
    """The "files" entry of a manifest, checked and converted."""
    found = {}
    for name, values in files.items() if isinstance(files, dict) else ():
        kinds = [type(value) for value in values] if isinstance(values, list) else []
        if kinds not in ([int, int], [int, int, str]):
            raise ValueError(f"{where} is damaged: it has no size and checksum of {name!r}")
        found[name] = FileProof(*values)
    if missing := {METADATA, RECORD} - found.keys():
        raise ValueError(f"{where} is damaged: it does not name {', '.join(sorted(missing))}")
    return found


def verify(folder: Path, rank: int, world: int) -> None:
    """Check this rank's share of the checkpoint's files; the files are divided among `world` ranks.

    Raises:
        ValueError: the checkpoint has a newer format, or a file is missing or damaged; the message names the file.
        OSError: a file cannot be read; the message names it.
    """
    files = read_files(folder) or {}
    for name in sorted(files)[rank::world]:
        _check(folder, name, files[name])


def read_record(folder: Path) -> dict[str, Any] | None:
    """Content of `hecate.json`, verified against the manifest; None for a checkpoint of another program.

    Raises:
        ValueError: `hecate.json` or the manifest is damaged.
        OSError: one of them cannot be read.
    """
    files = read_files(folder)
    if files is None:
        return None
    _check(folder, RECORD, files[RECORD])
    return _read_json(folder, RECORD)


def _check(folder: Path, name: str, expected: FileProof) -> None:
    path = file_of(folder, name)
    with _reading(folder, name):
        found = _proof_of(path, expected.sha256 is not None)
    if found != expected:
        raise ValueError(f"checkpoint {folder}: file {name} is damaged: {found}, written were {expected}")


def _proof_of(path: Path, sha256: bool) -> FileProof:
    num_bytes = crc32 = 0
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc32 = zlib.crc32(buffer[:count], crc32)
            num_bytes += count
            if sha256:
                digest.update(buffer[:count])
    return FileProof(num_bytes, crc32, digest.hexdigest() if sha256 else None)


def file_of(folder: Path, name: str) -> Path:
    """Path of a checkpoint's file; checks that it exists, is a regular file and lies in the folder."""
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"checkpoint {folder}: file {name} leads out of the folder, which is refused")
    if not path.is_file():
        raise ValueError(f"checkpoint {folder}: file {name} is missing")
    return path


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object that the file holds; ValueError if it holds anything else."""
    path = file_of(folder, name)
    try:
        with _reading(folder, name):
            content = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {folder}: file {name} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {folder}: file {name} is damaged: it holds no mapping")
    return content


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    """Add the file's name to an OSError; a read error from the disk does not have it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"checkpoint {folder}: file {name} cannot be read: {error.strerror}") from error
