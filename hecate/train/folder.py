"""The folder of a run: its files, and whether a run in it is resumed or deleted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hecate.checkpoint.folder import MANIFEST, delete, replace_file

__all__ = ["RunFolder"]

LAUNCHES = "launches.json"
FILES = ("config.yaml", "metrics.jsonl", "summary.json", "run.png", "trace.npz")
FOLDERS = ("checkpoints", "tensorboard", "wandb")
# Sections that must not change when a run is resumed; policy, devices, steps and learning rate may.
RESUMED_WITH = ("model", "data", "seed")


class RunFolder:
    """`runs/<name>/`; only rank 0 writes to it, except for the checkpoints, which all ranks write together.

    Args:
        path: path of the folder.
        config: resolved configuration.
        resume: whether an unfinished run is resumed.
        launches: see `signals.launches`. A run begun by the same launch, before a restart, is always resumed.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], resume: bool, launches: Mapping[str, bool]) -> None:
        self.path, self._config, self._resume, self._launches = path, dict(config), resume, launches

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def prepare(self) -> bool:
        """Make the folder and record the configuration; returns False if there is nothing left to do.

        Deletes a finished run, or with resume=false any run, unless this launch began it before a restart: then it is
        resumed, or there is nothing to do if it is finished.

        Raises:
            ValueError: the unfinished run to resume has another model, other data or another seed.
            OSError: the folder cannot be written, or something in it cannot be deleted.
        """
        finished, begun = (self.path / "summary.json").exists(), self._begun()
        if finished and begun:
            return False
        self.path.mkdir(parents=True, exist_ok=True)
        if not begun and (finished or not self._resume):
            self._drop()
        for partial in self.checkpoints.glob("*.tmp"):
            delete(partial)  # left by a killed process
        record = self.path / "config.yaml"
        if record.exists() and any(self.checkpoints.glob(f"*/{MANIFEST}")):
            self._check_same(OmegaConf.to_container(OmegaConf.load(record)))
        replace_file(record, OmegaConf.to_yaml(OmegaConf.create(self._config)))
        replace_file(self.path / LAUNCHES, json.dumps(sorted(self._launches)) + "\n")  # see `_begun`
        return True

    def _begun(self) -> bool:
        """Whether this launch had completed `prepare` before it was restarted."""
        record = self.path / LAUNCHES
        names = json.loads(record.read_text()) if record.exists() else []
        return any(again and name in names for name, again in self._launches.items())

    def _drop(self) -> None:
        """Delete the run. If a folder in it is a symbolic link, only the content of the folder is deleted.

        The summary goes last: while it exists the run counts as finished, so an interrupted deletion is repeated.
        """
        (self.path / LAUNCHES).unlink(missing_ok=True)
        for folder in (self.path / name for name in FOLDERS):
            if folder.is_symlink() and folder.is_dir():
                for entry in folder.iterdir():
                    delete(entry)
            elif folder.exists():
                delete(folder)
        for name in sorted(FILES, key=lambda name: name == "summary.json"):
            (self.path / name).unlink(missing_ok=True)

    def _check_same(self, before: Any) -> None:
        for section in RESUMED_WITH:
            if before[section] != self._config[section]:
                raise ValueError(
                    f"name={self.path.name!r}: the unfinished run has {section}={before[section]}, this one "
                    f"{section}={self._config[section]}; they must be equal to resume it (or resume=false drops it)"
                )
