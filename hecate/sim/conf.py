"""Reads the files of conf/sim with Hydra, and makes the records that the simulator takes from them."""

from __future__ import annotations

import difflib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hecate.carried import carried
from hecate.loads.scenario import Scenario
from hecate.loads.trace import Trace, read_trace
from hecate.sim.cluster import Cluster, read_cluster
from hecate.sim.fields import record_of
from hecate.sim.model import ModelShape, from_transformers, read_model
from hecate.sim.settings import Precision, Settings
from hecate.text import listed

__all__ = ["Task", "cluster_named", "conf_dir", "model_named", "names_of", "read_task", "trace_from"]

GROUPS = ("model", "cluster")


@dataclass(frozen=True)
class Task:
    """What a command line asks for.

    Attributes:
        model, cluster, settings: what to simulate.
        loads: generated or recorded.
        steps, patterns: see `simulate`.
    """

    model: ModelShape
    cluster: Cluster
    settings: Settings
    loads: Scenario | Trace
    steps: int
    patterns: int


def conf_dir() -> Path:
    """The folder conf/sim: inside the installed package, or beside it in a source tree."""
    return carried("conf/sim/config.yaml").parent


def names_of(group: str) -> list[str]:
    """The files of a group, "model" or "cluster"."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def model_named(name: str) -> ModelShape:
    """The model of a file of conf/sim/model, or of a transformers config.json by its path.

    Raises:
        ValueError: there is neither; the message lists the files.
    """
    if name in names_of("model"):
        return read_model(_file("model", name), name)
    if Path(name).exists():
        return from_transformers(name)
    raise _unknown("model", name, "a transformers config.json")


def cluster_named(name: str, devices: int | None = None) -> Cluster:
    """The cluster of a file of conf/sim/cluster, or of a profile or YAML file by its path.

    Args:
        name: the file's name, or a path.
        devices: another number of devices than it says.

    Raises:
        ValueError: there is neither (the message lists the files), or a key is missing, unknown or out of range.
    """
    if name in names_of("cluster"):
        found = read_cluster(_file("cluster", name), name)
    elif Path(name).is_file():
        found = read_cluster(_profile(Path(name)), name)
    else:
        raise _unknown("cluster", name, "a profile of hecate.sim.measure or a YAML file")
    return found if devices is None else found.resized(devices)


def read_task(words: Sequence[str]) -> Task:
    """What `key=value` words ask for; ValueError names what is wrong and lists what is valid."""
    named = {key: value for key, equals, value in (w.partition("=") for w in words) if equals and key in GROUPS}
    paths = {key: value for key, value in named.items() if value not in names_of(key)}
    values = _composed([word for word in words if word.partition("=")[0] not in paths])
    devices = values["devices"]
    model = model_named(paths["model"]) if "model" in paths else read_model(values["model"], named.get("model", ""))
    if "cluster" in paths:
        cluster = cluster_named(paths["cluster"])
    else:
        cluster = read_cluster(values["cluster"], named.get("cluster", ""))
    if devices is not None:
        cluster = cluster.resized(devices)
    return Task(
        model=model,
        cluster=cluster,
        settings=Settings(
            precision=record_of(Precision, "precision", values["precision"]),
            **{f.name: values[f.name] for f in fields(Settings) if f.name != "precision"},
        ),
        loads=record_of(Scenario, "loads", values["loads"]) if values["trace"] is None else trace_from(values["trace"]),
        steps=values["steps"],
        patterns=values["patterns"],
    )


def _composed(words: Sequence[str]) -> dict[str, Any]:
    try:
        import hydra
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise ValueError(
            f"{error.name} is missing: pip install 'hecate-moe[train]' (from a checkout: '.[train]')"
        ) from error
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r}: must be key=value")
    with hydra.initialize_config_dir(version_base=None, config_dir=str(conf_dir())):
        try:
            base = OmegaConf.to_container(hydra.compose("config"))
            assert isinstance(base, dict)
            _check_keys(words, {str(key): value for key, value in base.items()})
            found = OmegaConf.to_container(hydra.compose("config", overrides=list(words)), resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(str(error)) from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _check_keys(words: Sequence[str], base: Mapping[str, Any]) -> None:
    """Hydra refuses unknown keys too, but does not say which there are."""
    for word in words:
        place: Any = base
        for part in word.partition("=")[0].split("."):
            if not isinstance(place, dict) or part not in place:
                valid = sorted(place) if isinstance(place, dict) else []
                near = difflib.get_close_matches(part, valid, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{word}: no key {part!r}; there are {listed(valid)}{hint}")
            place = place[part]


def _file(group: str, name: str) -> dict[str, Any]:
    return dict(_composed([f"{group}={name}"])[group])


def _profile(path: Path) -> Mapping[str, Any]:
    """The cluster in a profile, or in a YAML file like those of conf/sim/cluster."""
    if path.suffix in (".yaml", ".yml"):
        return _yaml(path)
    try:
        content = json.loads(path.read_text())
        return dict(content["cluster"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"cluster={path}: not a profile of hecate.sim.measure ({error!r})") from error


def _yaml(path: Path) -> Mapping[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (UnicodeDecodeError, YAMLError) as error:
        raise ValueError(f"cluster={path}: not YAML ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"cluster={path}: must have the keys of a file of conf/sim/cluster")
    return {str(key): value for key, value in found.items()}


def trace_from(path: str) -> Trace:
    """The trace in a file; ValueError if there is none or it is damaged."""
    if not Path(path).is_file():
        raise ValueError(
            f"trace={path}: no such file; the trainer writes one to <output>/<name>/trace.npz (trace=true)"
        )
    try:
        return read_trace(path)
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, IndexError) as error:
        raise ValueError(f"trace={path}: damaged or not a trace ({error!r})") from error


def _unknown(group: str, name: str, otherwise: str) -> ValueError:
    return ValueError(f"{group}={name}: must be {otherwise} by its path, or one of {', '.join(names_of(group))}")
