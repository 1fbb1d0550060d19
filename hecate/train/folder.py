"""The folder of a run: which files it has, when it starts anew, and its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

__all__ = ["Position", "RunFolder"]

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "run.png", "trace.npz")
FOLDERS = ("checkpoints", "tensorboard", "wandb")
# Policy, devices, steps and learning rate may change in the middle of a run; these may not.
RESUMED_WITH = ("model", "data", "seed")


@dataclass(frozen=True)
class Position:
    """How far a run is. With the seed this is all that data and random numbers depend on.

    Attributes:
        step: optimizer steps taken.
        sequences: training sequences that all devices together have used.
    """

    step: int
    sequences: int


class RunFolder:
    """`runs/<name>/`; rank 0 alone writes, except for the checkpoints, which all ranks write together."""

    def __init__(self, path: Path, config: Mapping[str, Any], resume: bool) -> None:
        self.path, self._config, self._resume = path, dict(config), resume

    def prepare(self) -> None:
        """Make the folder and record the configuration.

        Drops what a finished run left, or, with resume=false, any run. ValueError where an unfinished one, which would
        be resumed, trains another model or on other data.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "summary.json").exists() or not self._resume:
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
            for name in FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
        record = self.path / "config.yaml"
        if self.latest() is not None:
            self._check_same(OmegaConf.to_container(OmegaConf.load(record)))
        OmegaConf.save(OmegaConf.create(self._config), record)

    def _check_same(self, before: Any) -> None:
        for section in RESUMED_WITH:
            if before[section] != self._config[section]:
                raise ValueError(
                    f"name={self.path.name!r}: the unfinished run has {section}={before[section]}, this one "
                    f"{section}={self._config[section]}; they must be equal to resume it (or resume=false drops it)"
                )

    def latest(self) -> tuple[Path, Position] | None:
        """The newest complete checkpoint: the engine's part, and the position."""
        complete = sorted((self.path / "checkpoints").glob("step-*/position.json"))
        if not complete:
            return None
        return complete[-1].parent / "state", Position(**json.loads(complete[-1].read_text()))

    def new_checkpoint(self, step: int) -> Path:
        """Where the engine is to save; it counts only after `commit`."""
        return self.path / "checkpoints" / f"step-{step:08d}" / "state"

    def commit(self, position: Position) -> None:
        """Declare the checkpoint of `position` complete, then drop the older ones."""
        folder = self.new_checkpoint(position.step).parent
        partial = folder / "position.part"
        partial.write_text(json.dumps(asdict(position)) + "\n")
        partial.rename(folder / "position.json")
        for other in folder.parent.glob("step-*"):
            if other != folder:
                shutil.rmtree(other)
