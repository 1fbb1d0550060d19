"""`python -m hecate.train [key=value ...]`: train a GPT-MoE or BERT-MoE; the keys are those of conf/config.yaml."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hecate.train.distributed import launch
from hecate.train.loop import run
from hecate.train.settings import Settings, conf_dir
from hecate.train.signals import CTRL_C_EXIT_CODE

__all__ = ["main"]

GROUPS = ("model", "data", "logger")


def main() -> None:
    """Check the command line, then run Hydra."""
    try:
        check_keys(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
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
        Settings.from_config(plain)
    except (ValueError, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")
    launch(plain, run)


def check_keys(arguments: Sequence[str]) -> None:
    """ValueError for an override of a key that does not exist; the message lists the existing keys.

    Hydra refuses such a key too, but without saying which keys are valid.
    """
    overrides = [a for a in arguments if "=" in a and not a.startswith(("-", "+", "~", "hydra"))]
    choices = [a for a in overrides if a.split("=")[0] in GROUPS]
    with hydra.initialize_config_dir(version_base=None, config_dir=str(conf_dir())):
        try:
            config = hydra.compose("config", overrides=choices)
        except HydraException as error:
            raise ValueError(str(error)) from error
    for override in overrides:
        _check_key(config, override.split("=")[0])


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
