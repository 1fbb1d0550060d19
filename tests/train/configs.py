"""Configurations of the trainer as the command line makes them."""

from __future__ import annotations

from typing import Any

import hydra
from omegaconf import OmegaConf

from hecate.train.settings import conf_dir


def config(*overrides: str) -> dict[str, Any]:
    with hydra.initialize_config_dir(version_base=None, config_dir=str(conf_dir())):
        resolved = OmegaConf.to_container(hydra.compose("config", overrides=list(overrides)), resolve=True)
    assert isinstance(resolved, dict)
    return {str(name): value for name, value in resolved.items()}
