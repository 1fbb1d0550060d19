"""The folder of a run: which files it has, and when it starts anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hecate.checkpoint.folder import MANIFEST

__all__ = ["RunFolder", "replace_file"]

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
        restarted: whether this process only goes on with what an earlier one of the same launch began.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], resume: bool, restarted: bool) -> None:
        self.path, self._config, self._resume, self._restarted = path, dict(config), resume or restarted, restarted

    @property
    def checkpoints(self) -> Path:
        """Where they are."""
        return self.path / "checkpoints"

    def prepare(self) -> bool:
        """Make the folder and record the configuration; whether there is something to do.

        Drops what a finished run left, or, with resume=false, any run; but a restarted one that is finished is done.

        Raises:
            ValueError: an unfinished run, which would be resumed, trains another model or on other data.
            OSError: the folder cannot be written.
        """
        finished = (self.path / "summary.json").exists()
        if finished and self._restarted:
            return False
        self.path.mkdir(parents=True, exist_ok=True)
        if finished or not self._resume:
            self._drop()
        for partial in self.checkpoints.glob("*.tmp"):
            shutil.rmtree(partial)  # what a killed process was writing
        record = self.path / "config.yaml"
        if record.exists() and any(self.checkpoints.glob(f"*/{MANIFEST}")):
            self._check_same(OmegaConf.to_container(OmegaConf.load(record)))
        replace_file(record, OmegaConf.to_yaml(OmegaConf.create(self._config)))
        return True

    def _drop(self) -> None:
        """The summary last: as long as it is there, the rest is to be dropped."""
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in sorted(FILES, key=lambda name: name == "summary.json"):
            (self.path / name).unlink(missing_ok=True)

    def _check_same(self, before: Any) -> None:
        for section in RESUMED_WITH:
            if before[section] != self._config[section]:
                raise ValueError(
                    f"name={self.path.name!r}: the unfinished run has {section}={before[section]}, this one "
                    f"{section}={self._config[section]}; they must be equal to resume it (or resume=false drops it)"
                )


def replace_file(path: Path, text: str) -> None:
    """Write `path` at once: whoever is killed meanwhile leaves the old one or the new one."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)
