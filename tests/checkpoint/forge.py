"""Makes manipulated checkpoints whose manifest is consistent."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint import Metadata

from hecate.checkpoint.manifest import MANIFEST, METADATA, FileProof, manifest_text, read_files


def forge_metadata(path: Path, change: Callable[[Metadata], None]) -> None:
    """Change `.metadata`, and the manifest accordingly."""
    metadata = pickle.loads((path / METADATA).read_bytes())
    change(metadata)
    forge(path, METADATA, pickle.dumps(metadata))


def forge(path: Path, name: str, data: bytes) -> None:
    """Replace or add a file, and change the manifest accordingly, if there is one."""
    (path / name).write_bytes(data)
    if (path / MANIFEST).exists():
        files = dict(read_files(path) or {})
        files[name] = FileProof(len(data), zlib.crc32(data))
        (path / MANIFEST).write_text(manifest_text(files))
