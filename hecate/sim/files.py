"""Files that commands write: refused before the work if they cannot be written."""

from __future__ import annotations

from pathlib import Path

__all__ = ["check_writable"]


def check_writable(option: str, path: Path | None) -> None:
    """ValueError if `path`, the value of `option`, is a folder, or in a folder that does not exist."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path}: must be a file, is a folder")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: its folder does not exist")
