"""Save and load a model under FSSDP with torch.distributed.checkpoint, at any number of devices."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from hecate.checkpoint.folder import ChecksumWriter, aside, find, prepare, publish, read_record, verify
from hecate.checkpoint.optimizer import OPTIMIZER, OptimizerTarget, optimizer_entries, optimizer_record
from hecate.checkpoint.rows import ExpertRows, ExpertsLoadPlanner, ExpertsSavePlanner
from hecate.checkpoint.state import PLANNER, Entry, TrainingState, compare_names
from hecate.collectives.ranks import agree, gather, on_rank_0, rank_and_world
from hecate.cost import CostModel

__all__ = ["Contents", "collect", "load", "write"]

Saved = dict[str, TensorStorageMetadata]


@dataclass(frozen=True)
class Contents:
    """Of a checkpoint: tensors by original names, and what is no tensor."""

    entries: dict[str, Entry]
    record: dict[str, Any]


def collect(
    path: Path, state: TrainingState, optimizer: Optimizer | None, extra: Mapping[str, Any], copy: bool
) -> Contents:
    """What is to be written to `path`: sharing memory with the model, or a copy on the CPU. See `FSSDP.save`."""
    where = f"FSSDP.save({str(path)!r})"
    entries = state.weights()
    _check_free(where, entries)
    entries |= state.planner()
    record: dict[str, Any] = {"mesh": state.mesh, "step": state.engine.step, "cost": asdict(state.cost)}
    record["extra"] = _as_json(where, extra)
    record["optimizer"] = None
    if optimizer is not None:
        entries |= optimizer_entries(state, optimizer)
        record["optimizer"] = optimizer_record(state, optimizer)
    if copy:
        entries = {name: _copy(value) for name, value in entries.items()}
    return Contents(entries, record)


def write(path: Path, contents: Contents, group: dist.ProcessGroup | None, in_thread: bool) -> None:
    """Put a checkpoint in the place of `path`, over `group` (None: the default one). Collective.

    Args:
        path: the folder; no link, see `resolved`.
        contents: of it.
        group: of all ranks.
        in_thread: whether other threads of the process go on meanwhile.
    """
    temporary = aside(path)
    agree(lambda: on_rank_0(lambda: prepare(path)), group)
    try:
        writer = ChecksumWriter(temporary)
        with _dcp(f"FSSDP.save({str(path)!r})"), nullcontext() if in_thread else _one_checksum():
            dcp.save(
                contents.entries,
                storage_writer=writer,
                planner=ExpertsSavePlanner(),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        checksums = {name: value for files in gather(writer.checksums, group) for name, value in files.items()}
        agree(lambda: on_rank_0(lambda: publish(temporary, path, contents.record, checksums)), group)
    except OSError:
        on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise


def _copy(value: Entry) -> Entry:
    if isinstance(value, ExpertRows):
        return replace(value, rows=value.rows.to("cpu", copy=True))
    return value.detach().to("cpu", copy=True)


def _as_json(where: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, which the caller cannot change while it is written."""
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: extra must be numbers, strings, lists and mappings: {error}") from None


def load(path: Path, state: TrainingState, optimizer: Optimizer | None) -> dict[str, Any]:
    """See `FSSDP.load`. All checks come first, then small entries are read, then what overwrites the model."""
    where = f"FSSDP.load({str(path)!r})"
    folder = agree(lambda: _verified(path))
    saved, record = agree(lambda: _read_metadata(folder))
    weights = state.weights()
    target = agree(lambda: _checked(where, saved, record, weights, state, optimizer))
    keys = None if record is None else state.planner_keys(record["mesh"][1])
    small = {key: _empty(saved[key]) for names in (keys or {}).values() for key in names.values()}
    small |= {} if target is None else target.scalars()
    _read(where, folder, dict(small))
    scalars = {key: value for key, value in small.items() if key.startswith(OPTIMIZER)}
    agree(lambda: target.check_scalars(scalars) if target is not None else None)
    _restart(state, record, keys, small)
    entries = state.weights()
    if target is not None:
        target.prepare(scalars)
        entries |= target.entries()
    _read(where, folder, entries)
    for pool in state.pools:
        for parameter in pool.parameters.values():
            pool.clear_padding(parameter)
    if target is not None:
        target.commit()
    return {} if record is None else record.get("extra", {})


def _restart(
    state: TrainingState,
    record: dict[str, Any] | None,
    keys: Mapping[str, Mapping[str, str]] | None,
    small: Mapping[str, Tensor],
) -> None:
    """Owners and cost model as saved where the mesh is the same, so that the run goes on bit by bit."""
    if record is None or keys is None:
        state.restart(0, None, None)
        return
    planners: dict[str, dict[str, NDArray[np.int64]]] = {
        layer: {key: small[entry].numpy() for key, entry in entries.items()} for layer, entries in keys.items()
    }
    state.restart(record["step"], planners, CostModel(**record["cost"]) if record["mesh"] == state.mesh else None)


# Checks before anything is overwritten.


def _verified(path: Path) -> Path:
    folder = find(path)
    verify(folder, *rank_and_world())
    return folder


def _read_metadata(folder: Path) -> tuple[Saved, dict[str, Any] | None]:
    """Tensors by name, and what is no tensor."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {k: v for k, v in metadata.items() if isinstance(v, TensorStorageMetadata)}, read_record(folder)


def _checked(
    where: str,
    saved: Saved,
    record: dict[str, Any] | None,
    weights: Mapping[str, Entry],
    state: TrainingState,
    optimizer: Optimizer | None,
) -> OptimizerTarget | None:
    own = [name for name in saved if not name.startswith((OPTIMIZER, PLANNER))]
    compare_names(where, own, weights, "parameters and buffers")
    # Experts first: another number of them shows in the router's shape too, which says less.
    for name, value in sorted(weights.items(), key=lambda item: not isinstance(item[1], ExpertRows)):
        _check_same(where, name, saved[name], value)
    if optimizer is None:
        return None
    if record is None or record["optimizer"] is None:
        raise ValueError(f"{where}: the checkpoint was saved without an optimizer; pass optimizer=None to load weights")
    states = {key: value for key, value in saved.items() if key.startswith(OPTIMIZER)}
    return OptimizerTarget(state, optimizer, record["optimizer"], states)


def _check_same(where: str, name: str, saved: TensorStorageMetadata, value: Entry) -> None:
    there, here = tuple(saved.size), tuple(value.shape)
    if isinstance(value, ExpertRows) and there[:1] != here[:1] and there[1:] == here[1:]:
        raise ValueError(f"{where}: {name} has {there[0]} experts in the checkpoint, {here[0]} in the model")
    if there != here:
        raise ValueError(f"{where}: {name} has shape {there} in the checkpoint, {here} in the model; must be equal")
    if saved.properties.dtype != value.dtype:
        raise ValueError(
            f"{where}: {name} has dtype {saved.properties.dtype} in the checkpoint, {value.dtype} in the model; "
            "must be equal (FSSDPConfig.master_dtype)"
        )


def _check_free(where: str, names: Mapping[str, Entry]) -> None:
    """Names of the model must not be mistaken for others'."""
    for name in names:
        if name.startswith((OPTIMIZER, PLANNER)):
            raise ValueError(f"{where}: {name} begins with {OPTIMIZER!r} or {PLANNER!r}; rename the submodule")


# torch.distributed.checkpoint.


def _empty(saved: TensorStorageMetadata) -> Tensor:
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def _read(where: str, folder: Path, entries: dict[str, Entry]) -> None:
    """Read into `entries`, in place."""
    with _dcp(where):
        reader = dcp.FileSystemReader(folder)
        dcp.load(entries, storage_reader=reader, planner=ExpertsLoadPlanner(), no_dist=not dist.is_initialized())


@contextmanager
def _one_checksum() -> Iterator[None]:
    """Without the checksums of torch.save, beside those of whole files; for all threads, which is how torch has it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def _dcp(where: str) -> Iterator[None]:
    """Its failures as OSError (they are no Exception), and no warning where there is no process group on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.api.CheckpointException as failure:
            first = min(failure.failures)
            raise OSError(f"{where}: rank {first}: {failure.failures[first][0]!r}") from failure
