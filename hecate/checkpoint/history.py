"""Several checkpoints in a folder: find the newest intact one, delete old ones."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from hecate.checkpoint.folder import aside, delete
from hecate.checkpoint.manifest import MANIFEST, RECORD, read_record, verify
from hecate.ranks.agree import agree, gather, on_rank_0, rank_and_world

__all__ = ["checkpoints", "latest", "prune"]


DELETED = ".deleted"
UNREADABLE = sys.maxsize
"""Step of a checkpoint whose record cannot be read: `latest` tries it first, so that its warning names the file."""


def latest(folder: Path) -> Path | None:
    """The intact checkpoint with the most steps at or below `folder`; None if there is none. Collective.

    Checkpoints are recognized by their content, not by their names, and may be links. One that is damaged or
    unreadable is skipped with a warning that names the file. OSError if a folder cannot be listed.
    """
    rank, world = rank_and_world()
    steps = gather(agree(lambda: checkpoints(folder) if rank == 0 else {}))[0]  # other ranks may see an older state
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        try:
            agree(lambda path=path: verify(path, rank, world))  # type: ignore[misc]
        except (ValueError, OSError) as error:
            if rank == 0:
                warnings.warn(f"{error}; it is passed over", stacklevel=2)
        else:
            return path
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints below `folder` except the `keep` >= 1 with the most steps and the latest written.

    Collective. The latest written is kept because those with more steps may be damaged: a run that skipped them when
    it resumed writes lower steps. A checkpoint whose step cannot be read is neither counted nor deleted. If a
    checkpoint is a link, only the link is deleted.
    """
    if keep < 1:
        raise ValueError(f"prune: keep={keep} must be >= 1")
    agree(lambda: on_rank_0(lambda: _prune(folder, keep)))


def _prune(folder: Path, keep: int) -> None:
    steps = {path: order for path, order in checkpoints(folder).items() if order[0] < UNREADABLE}
    newest = max(steps, key=lambda path: steps[path][1], default=None)
    for path in sorted(steps, key=lambda path: steps[path], reverse=True)[keep:]:
        if path == newest:
            continue
        if path.is_symlink():
            path.unlink()
        else:
            path.rename(path.with_name(path.name + DELETED))  # atomic, unlike deletion: never half a checkpoint
    for path in _folders(folder):
        if path.name.endswith(DELETED):
            delete(path)


def checkpoints(folder: Path) -> dict[Path, tuple[int, int]]:
    """Checkpoints at or below `folder`, intact or damaged -> sort key (step, time of writing in ns)."""
    found = {}
    for path in _folders(folder):
        files = [file for name in (MANIFEST, RECORD) if (file := path / name).exists()]
        if files and not path.name.endswith((aside(path).suffix, DELETED)):
            found[path] = (_step(path), files[0].stat().st_mtime_ns)
    return found


def _folders(folder: Path) -> list[Path]:
    """`folder`, all folders below it, and links there to folders elsewhere."""
    found: dict[str, Path] = {}
    links: list[Path] = []
    for parent, names, _ in os.walk(folder, onerror=_raise_unless_gone):
        found[os.path.realpath(parent)] = Path(parent)
        links += [link for name in names if (link := Path(parent, name)).is_symlink()]
    for link in links:
        found.setdefault(os.path.realpath(link), link)
    return list(found.values())


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _step(path: Path) -> int:
    """The step in the checkpoint's record; `UNREADABLE` if the record or the manifest is damaged or unreadable."""
    try:
        record = read_record(path)
        return UNREADABLE if record is None else int(record["step"])
    except (ValueError, OSError, KeyError, TypeError):
        return UNREADABLE
