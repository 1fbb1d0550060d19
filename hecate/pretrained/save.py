"""Save a model under FSSDP as a folder that transformers can load; each rank writes its own files."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hecate.checkpoint.folder import aside, prepare, replace_folder, resolved, sync
from hecate.checkpoint.state import TrainingState
from hecate.names import first_names
from hecate.pretrained.conversion import Format, steps_to_write
from hecate.pretrained.entries import shapes_of
from hecate.pretrained.files import INDEX, SINGLE, ShardFile, TensorMeta, num_bytes
from hecate.pretrained.writing import Writing
from hecate.ranks.agree import agree, gather, on_rank_0, rank_and_world
from hecate.text import listed

__all__ = ["save_pretrained"]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
REPLACED = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json"
)

Tensors = dict[str, TensorMeta]
"""The tensors of one file by name."""


def save_pretrained(
    folder: Path, state: TrainingState, form: Format, group: dist.ProcessGroup | None, max_shard_size: int | str
) -> None:
    """See `FSSDP.save_pretrained`.

    Args:
        folder: folder to write; an existing model in it is replaced.
        state: training state of the model.
        form: file format of the model.
        group: process group of the devices that share experts; None for a single device.
        max_shard_size: largest size of one file, in bytes or as text like "5GB".
    """
    folder = resolved(folder)
    where = f"FSSDP.save_pretrained({str(folder)!r})"
    writing = agree(lambda: _planned(where, state, form, group))
    own = agree(lambda: _split(_distinct(where, writing.tensors()), _limit(where, max_shard_size)))
    by_rank = gather(own)
    files = _named(where, list(chain.from_iterable(by_rank)))
    first = sum(map(len, by_rank[: rank_and_world()[0]]))
    temporary = aside(folder)
    agree(lambda: on_rank_0(lambda: prepare(folder)))
    try:
        _write(writing, {temporary / name: files[name] for name in list(files)[first : first + len(own)]})
        agree(lambda: on_rank_0(lambda: _finish(temporary, folder, state, form, files)))
    except Exception:
        on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise


def _planned(where: str, state: TrainingState, form: Format, group: dist.ProcessGroup | None) -> Writing:
    entries = state.weights()
    tied: dict[str, list[str]] = {}
    first = first_names(state.model)
    for name in entries:
        tied.setdefault(first.get(name, name), []).append(name)
    # A tied tensor is written once, under the name that transformers ties the others to.
    names = [next((n for n in same if n not in form.tied), same[0]) for same in tied.values()]
    steps = steps_to_write(form, [name for name in names if name not in form.unsaved])
    owners = {
        spec.name_of(kind): pool.owners[row]
        for pool in state.pools
        for row, spec in enumerate(pool.specs)
        for kind in pool.parameters
    }
    shapes = shapes_of(entries)
    writing = Writing(where, entries, owners, shapes, tuple(steps), form, group, state.replica, state.replicas)
    writing.check()
    return writing


def _limit(where: str, size: int | str) -> int:
    """`size` in bytes; ValueError if it cannot be parsed."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", str(size).upper())
    if match is None or int(match[1]) < 1:
        raise ValueError(f"{where}: max_shard_size={size!r}; must be a number of bytes or like '5GB' or '500MiB'")
    return int(match[1]) * UNITS[match[2] or ""]


def _split(tensors: Tensors, limit: int) -> list[Tensors]:
    """Split tensors, in order, into files of at most `limit` bytes each; a larger tensor gets a file of its own."""
    files: list[Tensors] = []
    room = 0
    for name, meta in tensors.items():
        if not files or num_bytes(meta) > room:
            files.append({})
            room = limit
        files[-1][name] = meta
        room -= num_bytes(meta)
    return files


def _distinct(where: str, tensors: Iterable[tuple[str, TensorMeta]]) -> Tensors:
    """Tensors by name; ValueError if a name occurs twice."""
    pairs = list(tensors)
    _refuse_twice(where, (name for name, _ in pairs))
    return dict(pairs)


def _refuse_twice(where: str, names: Iterable[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: {listed(twice)} would be written twice; names must be distinct")


def _named(where: str, files: list[Tensors]) -> dict[str, Tensors]:
    """Files by name, following transformers' naming; ValueError if two have the same tensor."""
    _refuse_twice(where, chain.from_iterable(files))
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}


def _write(writing: Writing, files: Mapping[Path, Tensors]) -> None:
    """Write this rank's files. Collective; OSError on all ranks if one of them failed."""
    opened = agree(lambda: {path: ShardFile(path, tensors) for path, tensors in files.items()})
    try:
        writing.run({name: opened[path] for path, tensors in files.items() for name in tensors})
    finally:
        for file in opened.values():
            file.close()
    agree(lambda: _check(opened.values()))


def _check(files: Iterable[ShardFile]) -> None:
    for file in files:
        file.check()


def _finish(temporary: Path, folder: Path, state: TrainingState, form: Format, files: Mapping[str, Tensors]) -> None:
    """On rank 0: write the index and the configs, then put the folder in place."""
    if len(files) > 1:
        sizes = [num_bytes(meta) for tensors in files.values() for meta in tensors.values()]
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if form.config is not None:
        config = deepcopy(form.config)
        config.architectures = [form.architecture]
        dtype = next(iter(state.pools[0].parameters.values())).dtype
        config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(temporary)
        model: Any = state.model
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
    for file in temporary.glob("*.json"):
        sync(file)
    replace_folder(temporary, folder, keep=lambda name: REPLACED.fullmatch(name) is None)
