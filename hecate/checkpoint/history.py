"""Several checkpoints in a folder: which is the newest that is whole, and which can go."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

from hecate.checkpoint.folder import MANIFEST, aside, read_record, verify
from hecate.collectives.ranks import agree, on_rank_0, rank_and_world

__all__ = ["latest", "prune"]


DELETED = ".deleted"
UNREADABLE = sys.maxsize
"""Step of a checkpoint whose record is damaged: tried first, so that it is named."""


def latest(folder: Path) -> Path | None:
    """The checkpoint anywhere below `folder` with the most steps whose files are all whole; None if there is none.

    Found by what is in it, not by its name. One that is damaged is passed over with a warning that names the file.
    Collective.
    """
    steps = agree(lambda: _steps(folder))
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        try:
            agree(lambda path=path: verify(path, *rank_and_world()))  # type: ignore[misc]
        except ValueError as error:
            text = f"{error}; it is passed over"
            on_rank_0(lambda text=text: warnings.warn(text, stacklevel=4))  # type: ignore[misc]
        else:
            return path
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints below `folder` but the `keep` >= 1 with the most steps and the newest. Collective.

    The newest is kept because those of more steps may be damaged: a run that passed over them is behind them. One whose
    step cannot be read is neither counted nor deleted.
    """
    if keep < 1:
        raise ValueError(f"prune: keep={keep} must be >= 1")
    agree(lambda: on_rank_0(lambda: _prune(folder, keep)))


def _prune(folder: Path, keep: int) -> None:
    steps = {path: order for path, order in _steps(folder).items() if order[0] < UNREADABLE}
    newest = max(steps, key=lambda path: steps[path][1], default=None)
    for path in sorted(steps, key=lambda path: steps[path], reverse=True)[keep:]:
        if path == newest:
            continue
        path.rename(path.with_name(path.name + DELETED))  # at once, so that no part of it is taken for a checkpoint
    for path in list(folder.rglob(f"*{DELETED}")):
        shutil.rmtree(path)


def _steps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Complete checkpoints and their order: by step, at equal steps by when they were written."""
    paths = [manifest.parent for manifest in folder.rglob(MANIFEST)]
    return {
        path: (_step(path), (path / MANIFEST).stat().st_mtime_ns)
        for path in paths
        if not path.name.endswith((aside(path).suffix, DELETED))
    }


def _step(path: Path) -> int:
    """The record's; `UNREADABLE` where that is damaged."""
    try:
        record = read_record(path)
    except ValueError:
        return UNREADABLE
    return UNREADABLE if record is None else int(record["step"])
