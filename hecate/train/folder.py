"""The folder of a run: its files, and whether a run in it is continued, left as it is or replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hecate.checkpoint.folder import MANIFEST, delete, replace_file
from hecate.train.loggers import RUN_ID

__all__ = ["RunFolder"]

LAUNCHES = "launches.json"
SUMMARY = "summary.json"
FILES = (
    *("config.yaml", "metrics.jsonl", SUMMARY, "run.png", "report.html", RUN_ID),
    *("layers.bin", "layers.damaged.bin", "trace.npz", "trace.damaged.npz"),
)
FOLDERS = ("checkpoints", "pretrained", "profile", "tensorboard", "wandb")
# Keys that must not change when a run is resumed; policy, devices, steps and learning rate may.
RESUMED_WITH = ("model", "data", "seed", "optimizer._target_")


class RunFolder:
    """`runs/<name>/`; only rank 0 writes to it, except for the checkpoints, which all ranks write together.

    Args:
        path: path of the folder.
        config: resolved configuration.
        overwrite: whether a run that is there is deleted.
        launches: see `signals.launches`. A run begun by the same launch, before a restart, is always continued.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], overwrite: bool, launches: Mapping[str, bool]) -> None:
        self.path, self.config, self._overwrite, self._launches = path, dict(config), overwrite, launches

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def pretrained(self) -> Path:
        """Folder of the trained model in transformers' format."""
        return self.path / "pretrained"

    def prepare(self) -> bool:
        """Make the folder and record the configuration; returns False if there is nothing left to do.

        An unfinished run is continued; so is a finished one if it is to have more steps now. With overwrite=true what
        is there is deleted, unless this launch began it before a restart.

        Raises:
            ValueError: the run to continue has another model, other data or another seed, or left no checkpoint.
            OSError: the folder cannot be written, or something in it cannot be deleted.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._overwrite and not self._begun():
            self._drop()
        for partial in self.checkpoints.glob("*.tmp"):
            delete(partial)  # left by a killed process
        record, saved = self.path / "config.yaml", any(self.checkpoints.glob(f"*/{MANIFEST}"))
        before: Any = OmegaConf.to_container(OmegaConf.load(record)) if record.exists() else None
        finished = self.path / SUMMARY
        if before is not None and (saved or finished.exists()):
            self._check_same(before)
        if finished.exists():
            if before is None or self.config["steps"] <= before["steps"]:
                return False
            if not saved:
                raise ValueError(
                    f"name={self.path.name!r}: the run of {before['steps']} steps left no checkpoint "
                    f"(save_interval=0), so that steps={self.config['steps']} cannot continue it; overwrite=true "
                    "starts it again"
                )
            finished.unlink()
        replace_file(record, OmegaConf.to_yaml(OmegaConf.create(self.config)))
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
        for name in sorted(FILES, key=lambda name: name == SUMMARY):
            (self.path / name).unlink(missing_ok=True)

    def _check_same(self, before: Any) -> None:
        for key in RESUMED_WITH:
            there, here = (OmegaConf.select(OmegaConf.create(config), key) for config in (before, self.config))
            if there != here:
                raise ValueError(
                    f"name={self.path.name!r}: the run in this folder has {_differences(key, there, here)}; they "
                    "must be equal to continue it (another name makes another run, overwrite=true replaces it)"
                )


def _differences(key: str, there: Any, here: Any) -> str:
    """The keys below `key` whose values differ, with both values."""
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        return f"{key}={there!r}, this command {here!r}"
    keys = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(_differences(f"{key}.{name}", there.get(name), here.get(name)) for name in keys)
