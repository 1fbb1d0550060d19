"""The folder of a run: which files it has, and when it starts anew."""

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
# Policy, devices, steps and learning rate may change in the middle of a run; these may not.
RESUMED_WITH = ("model", "data", "seed")


class RunFolder:
    """`runs/<name>/`; rank 0 alone writes, except for the checkpoints, which all ranks write together.

    Args:
        path: of the folder.
        config: resolved.
        resume: whether an unfinished run goes on.
        launches: see `signals.launches`. What an earlier process of the same one began goes on in any case.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], resume: bool, launches: Mapping[str, bool]) -> None:
        self.path, self._config, self._resume, self._launches = path, dict(config), resume, launches

    @property
    def checkpoints(self) -> Path:
        """Where they are."""
        return self.path / "checkpoints"

    def prepare(self) -> bool:
        """Make the folder and record the configuration; whether there is something to do.

        Drops what a finished run left, or, with resume=false, any run; but not the one that this launch began before it
        was restarted, which goes on, or is done.

        Raises:
            ValueError: an unfinished run, which would be resumed, trains another model or on other data.
            OSError: the folder cannot be written, or something in it not be deleted.
        """
        finished, begun = (self.path / "summary.json").exists(), self._begun()
        if finished and begun:
            return False
        self.path.mkdir(parents=True, exist_ok=True)
        if not begun and (finished or not self._resume):
            self._drop()
        for partial in self.checkpoints.glob("*.tmp"):
            delete(partial)  # what a killed process was writing
        record = self.path / "config.yaml"
        if record.exists() and any(self.checkpoints.glob(f"*/{MANIFEST}")):
            self._check_same(OmegaConf.to_container(OmegaConf.load(record)))
        replace_file(record, OmegaConf.to_yaml(OmegaConf.create(self._config)))
        replace_file(self.path / LAUNCHES, json.dumps(sorted(self._launches)) + "\n")  # from here on it is begun
        return True

    def _begun(self) -> bool:
        """Whether an earlier process of this launch has come to the end of `prepare`."""
        record = self.path / LAUNCHES
        names = json.loads(record.read_text()) if record.exists() else []
        return any(again and name in names for name, again in self._launches.items())

    def _drop(self) -> None:
        """The summary last: as long as it is there, the rest is to be dropped. A linked folder stays, empty."""
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
