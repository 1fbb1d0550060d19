"""`python -m hecate.train [key=value ...]`: train a GPT-MoE or BERT-MoE; the keys are those of conf/config.yaml."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

try:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from hecate.train.distributed import check_launch, launch
    from hecate.train.loop import run
    from hecate.train.profiling import PATTERN
    from hecate.train.settings import Settings, conf_dir
    from hecate.train.signals import CTRL_C_EXIT_CODE
except ModuleNotFoundError as error:  # the package alone needs torch and numpy only
    sys.exit(f"error: the trainer needs {error.name}, which is not installed: pip install 'hecate-moe[train]'")

__all__ = ["main"]

RANK_0_SPEAKS_WITHIN = 10
"""Seconds that other ranks give rank 0, which may start later, to say what is wrong with the command line."""
LONGEST = 200
"""Bytes of a name; most file systems allow 255 for a file name."""
GROUPS = ("model", "data", "optimizer", "logger")
WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")
"""Options of Hydra whose value is the next word."""


def main() -> None:
    """Check the command line, then run Hydra."""
    sys.argv[1:] = options_first([_quoted(argument) for argument in sys.argv[1:]])
    try:
        check_keys(sys.argv[1:])
    except ValueError as error:
        _refuse(error)
    try:
        _train()
    except KeyboardInterrupt:  # before the signal handlers are installed
        sys.exit(CTRL_C_EXIT_CODE)


@hydra.main(version_base=None, config_path=str(conf_dir()), config_name="config")
def _train(config: DictConfig) -> None:
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(resolved, dict)
        plain = {str(name): value for name, value in resolved.items()}
        plain["name"] = _name(plain["name"])
        Settings.from_config(plain)
        check_launch(plain["devices"])
    except (ValueError, OmegaConfBaseException) as error:
        _refuse(error)
    launch(plain, run)


def _refuse(error: Exception) -> NoReturn:
    """End with exit code 1; where a launcher has started many ranks with one command line, rank 0 says why.

    A launcher ends all ranks when the first has ended, so the others wait until rank 0 has said it.
    """
    if os.environ.get("RANK", "0") == "0":
        sys.exit(f"error: {error}")
    time.sleep(RANK_0_SPEAKS_WITHIN)
    sys.exit(1)


def options_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's options, with their values, before the overrides, between which Hydra does not look for options.

    So a launch script can put overrides of its own before those of the user.
    """
    options: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = "=" in argument or argument.startswith(("+", "~"))
        plain = argument.startswith("-") or before in WITH_VALUE or not is_override
        (options if plain else overrides).append(argument)
    return [*options, *overrides]


def _quoted(argument: str) -> str:
    """`profile=steps:10-12,all` with the value in quotes, without which Hydra takes it for two values."""
    key, _, value = argument.partition("=")
    return f"{key}='{value}'" if key == "profile" and PATTERN.fullmatch(value) else argument


def _name(name: str) -> str:
    """The run's name: in a multirun with the job's overrides, so that no two jobs share a folder."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return name
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("name=")]
    given = [name] if len(overrides) < len(HydraConfig.get().overrides.task) else []
    long = ",".join([*given, *overrides]).replace("/", "_")
    if len(long.encode()) <= LONGEST:
        return long
    return f"{long[: LONGEST // 4]}...{hashlib.sha256(long.encode()).hexdigest()[:16]}"


def check_keys(arguments: Sequence[str]) -> None:
    """ValueError for an override of a key that does not exist; the message lists the existing keys.

    Hydra refuses such a key too, but without saying which keys are valid. What a folder given by `--config-dir` adds
    exists too; with another primary config (`--config-name`, `--config-path`) only Hydra checks.
    """
    if any(a.startswith(("--config-name", "-cn", "--config-path", "-cp")) for a in arguments):
        return
    given = [Path(folder) for folder in _config_dirs(arguments)]
    if missing := [str(folder) for folder in given if not folder.is_dir()]:
        raise ValueError(f"--config-dir {missing[0]}: no such folder")
    folders = [f"hydra.searchpath=[file://{folder.absolute()}]" for folder in given]
    overrides = [a for a in arguments if "=" in a and not a.startswith(("-", "+", "~", "hydra"))]
    choices = [a for a in arguments if "=" in a and (a.split("=")[0] in GROUPS or a.startswith("+"))]
    with hydra.initialize_config_dir(version_base=None, config_dir=str(conf_dir())):
        try:
            config = hydra.compose("config", overrides=[*folders, *(c for c in choices if "," not in c)])
        except HydraException as error:
            raise ValueError(str(error)) from error
    for override in overrides:
        _check_key(config, override.split("=")[0])


def _config_dirs(arguments: Sequence[str]) -> list[str]:
    """Values of Hydra's `--config-dir`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    folders: list[str] = parser.parse_known_args(arguments)[0].config_dir
    return folders


def _check_key(config: DictConfig, key: str) -> None:
    node: object = config
    parents: list[str] = []
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118  # a missing value (???) is "not in" its node
            place = f"{'.'.join(parents)} has" if parents else "there are"
            valid = ", ".join(sorted(map(str, node))) if isinstance(node, DictConfig) else "none"
            raise ValueError(f"key {key!r} does not exist; {place} the keys {valid}")
        parents.append(part)
        node = OmegaConf.select(config, ".".join(parents), throw_on_missing=False)


if __name__ == "__main__":
    main()
