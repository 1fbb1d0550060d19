"""Check from the files' headers that a folder fits a model, before anything is overwritten."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hecate.pretrained.conversion import Conversion, not_per_expert
from hecate.pretrained.files import DTYPES
from hecate.pretrained.reading import Reading
from hecate.text import listed

__all__ = ["checked", "refuse_quantized"]


def refuse_quantized(where: str, folder: Path) -> None:
    """ValueError if `config.json` says that the weights are quantized."""
    config = folder / "config.json"
    quantized = json.loads(config.read_text()).get("quantization_config") if config.exists() else None
    if quantized is not None:
        raise ValueError(
            f"{where}: the weights are quantized ({quantized.get('quant_method')}); must be floating point, "
            "save them dequantized with transformers first"
        )


def checked(reading: Reading, unexpected: Sequence[str], first: Mapping[str, str], needed: Set[str]) -> Reading:
    """`reading` without the steps that make a tied tensor a second time.

    Args:
        reading: all steps of the folder.
        unexpected: keys in the files that no step uses.
        first: original name -> first name of the same tensor, see `first_names`.
        needed: names that must be in the folder.

    Raises:
        ValueError: names, shapes or dtypes do not fit, or the folder has a tied tensor twice with different values.
    """
    made: dict[str, Conversion] = {}
    again: list[tuple[Conversion, Conversion]] = []
    for step in reading.steps:
        names = {first.get(name, name) for name in _results(reading, step)}
        again += [(made[name], step) for name in names & made.keys()]
        made |= dict.fromkeys(names - made.keys(), step)
    _check_names(reading, made, unexpected, first, needed)
    for one, other in again:
        _check_equal(reading, one, other)
    return replace(reading, steps=tuple(dict.fromkeys(made.values())))


def _results(reading: Reading, step: Conversion) -> Iterable[str]:
    """Names of the tensors that `step` makes; checks that they fit the model."""
    if reading.is_expert(step.target):
        _check_experts(reading, step)
    try:
        results = reading.metas(step)
    except Exception as error:  # transformers' operations can raise anything
        raise ValueError(f"{reading.where}: cannot make {step.target} of {listed(step.names)}: {error!r}") from error
    for name, value in results.items():
        _check_fits(reading, step, name, value)
    return results


def _check_experts(reading: Reading, step: Conversion) -> None:
    """ValueError unless the tensors of every expert exist and can be converted one expert at a time."""
    if operation := not_per_expert(step):
        raise ValueError(
            f"{reading.where}: {step.target} cannot be made one expert at a time: transformers' conversion of "
            f"{step.names[0]} has {operation}; save the folder with save_original_format=False"
        )
    num_experts = reading.rows(step.target).num_experts
    for pattern, keys in step.sources.items():
        shapes = {reading.files.tensors[key].shape for key in keys}
        if pattern in step.by_expert and len(shapes) > 1:
            raise ValueError(f"{reading.where}: {listed(keys)} have shapes {sorted(shapes)}; must be equal")
        stacked = next(iter(shapes))[:1]
        found = len(keys) if pattern in step.by_expert else stacked[0] if stacked else 0
        if found != num_experts:
            raise ValueError(
                f"{reading.where}: {step.target} has {found} experts in the folder ({keys[0]} ...), "
                f"{num_experts} in the model; must be equal"
            )


def _check_fits(reading: Reading, step: Conversion, name: str, value: Tensor) -> None:
    """ValueError unless a result has the model's shape and kind of dtype (floating point or not)."""
    if name not in reading.entries or reading.is_expert(name) != reading.is_expert(step.target):
        raise ValueError(f"{reading.where}: {listed(step.names)} make {name} too, which the model does not have there")
    if value.shape != reading.shapes[name]:
        whole = reading.entries[name].shape
        found = torch.Size((whole[0], *value.shape[1:])) if reading.is_expert(name) else value.shape
        raise ValueError(
            f"{reading.where}: {name} has shape {tuple(found)} in the folder ({step.names[0]}), {tuple(whole)} in the "
            "model; must be equal"
        )
    floating = reading.entries[name].dtype.is_floating_point
    for key in step.names:
        dtype = DTYPES.get(reading.files.tensors[key].dtype)
        if dtype is None or dtype.is_floating_point != floating:
            raise ValueError(
                f"{reading.where}: {key} has dtype {reading.files.tensors[key].dtype} in the folder, {name} "
                f"{reading.entries[name].dtype} in the model; both must be floating point of at least 16 bits, or none"
            )


def _check_names(
    reading: Reading, made: Iterable[str], unexpected: Sequence[str], first: Mapping[str, str], needed: Set[str]
) -> None:
    lacking = {first.get(name, name) for name in reading.entries} - set(made)
    ignored = reading.writes.ignored_missing
    missing = [n for n in lacking if n in needed or not any(re.search(pattern, n) for pattern in ignored)]
    parts = []
    if missing:
        parts.append(f"lacks {listed(missing)}")
    if unexpected:
        parts.append(f"has {listed(unexpected)}, which the model does not know")
    if parts:
        raise ValueError(f"{reading.where}: the folder " + "; it ".join(parts))


def _check_equal(reading: Reading, one: Conversion, other: Conversion) -> None:
    """ValueError unless two steps that make the same tied parameter make equal values."""
    pairs = zip(reading.values(one), reading.values(other), strict=True)
    if not all(torch.equal(first, second) for (_, first), (_, second) in pairs):
        raise ValueError(
            f"{reading.where}: {one.names[0]} and {other.names[0]} are one tensor in the model, but differ in the "
            "folder; build the model with tie_word_embeddings=False"
        )
