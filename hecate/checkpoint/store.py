"""Save and load a model under FSSDP with torch.distributed.checkpoint (DCP), on any number of devices."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from hecate.checkpoint.cover import check_stored
from hecate.checkpoint.folder import aside, find, prepare, publish
from hecate.checkpoint.manifest import MANIFEST, METADATA, RECORD, file_of, read_files, read_record, verify
from hecate.checkpoint.metadata import CheckedReader, read_metadata
from hecate.checkpoint.optimizer import OPTIMIZER, OptimizerTarget, optimizer_entries, optimizer_record
from hecate.checkpoint.record import check_planners, check_record, planner_entries
from hecate.checkpoint.rows import ExpertRows, ExpertsLoadPlanner
from hecate.checkpoint.state import PLANS, Entry, TrainingState, compare_names, listed
from hecate.checkpoint.writer import ProvingWriter, write_entries
from hecate.cost import CostModel
from hecate.ranks.agree import PrivateRanks, Ranks

__all__ = ["Contents", "check_ranks", "collect", "load", "write"]

Keys = Mapping[str, Mapping[str, str]]
"""Layer -> key of its `LayerPlans.state()` -> entry name."""
MOST_AUTOMATIC_SLOTS = 2
"""The largest number of copies per device and layer that `memory_slots="auto"` chooses."""


@dataclass(frozen=True)
class Contents:
    """Content of a checkpoint: tensors by original names, and the record of everything that is not a tensor."""

    entries: dict[str, Entry]
    record: dict[str, Any]


def collect(
    path: Path, state: TrainingState, optimizer: Optimizer | None, extra: Mapping[str, Any], copy: bool
) -> Contents:
    """The content to write to `path`; shares memory with the model unless `copy`, which copies it to the CPU.

    See `FSSDP.save`.
    """
    where = f"FSSDP.save({str(path)!r})"
    entries = state.weights()
    _check_free(where, entries)
    entries |= state.plans()
    record: dict[str, Any] = {"mesh": state.mesh, "step": state.engine.step, "cost": asdict(state.cost)}
    record["extra"] = _as_json(where, extra)
    record["optimizer"] = None
    if optimizer is not None:
        entries |= optimizer_entries(state, optimizer)
        record["optimizer"] = optimizer_record(state, optimizer)
    if copy:
        entries = {name: _copy(value) for name, value in entries.items()}
    return Contents(entries, record)


def write(path: Path, contents: Contents, ranks: PrivateRanks, in_thread: bool, sha256: bool) -> None:
    """Write a checkpoint and put it at `path`, either completely (verified on every rank) or not at all. Collective.

    Args:
        path: the folder, without symbolic links, see `resolved`.
        contents: content of the checkpoint.
        ranks: ranks that hold the model; does not depend on the default process group.
        in_thread: whether other threads of the process keep running meanwhile.
        sha256: whether to also record the SHA-256 of every file.
    """
    where, temporary = f"FSSDP.save({str(path)!r})", aside(path)
    ranks.agree(lambda: ranks.on_rank_0(lambda: prepare(path)))
    try:
        with nullcontext() if in_thread else _one_checksum():
            files = write_entries(where, contents.entries, ProvingWriter(temporary, sha256), ranks)
        ranks.agree(lambda: ranks.on_rank_0(lambda: publish(temporary, path, contents.record, files, sha256)))
    except OSError:
        ranks.on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise


def _copy(value: Entry) -> Entry:
    if isinstance(value, ExpertRows):
        return replace(value, rows=value.rows.to("cpu", copy=True))
    return value.detach().to("cpu", copy=True)


def _as_json(where: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `extra`, so that the caller may change the original; ValueError if it cannot be written as JSON."""
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: extra must be numbers, strings, lists and mappings: {error}") from None


def check_ranks(where: str, state: TrainingState, ranks: Ranks) -> None:
    """RuntimeError unless `ranks` has as many ranks as the model; without a process group each rank would act alone."""
    held = state.replicas * state.pools[0].num_devices
    if ranks.size != held:
        raise RuntimeError(
            f"{where}: the model is on {held} ranks, the process group has {ranks.size}; call it on all of them, and "
            "before destroy_process_group"
        )


def load(path: Path, state: TrainingState, optimizer: Optimizer | None) -> dict[str, Any]:
    """See `FSSDP.load`. First everything is checked, then small entries are read, then the model is overwritten."""
    where, ranks = f"FSSDP.load({str(path)!r})", Ranks.current()
    check_ranks(where, state, ranks)
    folder = ranks.agree(lambda: _verified(path, ranks))
    found = ranks.agree(lambda: Found(folder, read_metadata(folder), read_record(folder)))
    target, keys = ranks.agree(lambda: _checked(where, found, state, optimizer))
    small = {key: _empty(found.tensors[key]) for names in keys.values() for key in names.values()}
    small |= {} if target is None else target.scalars()
    _read(where, found, dict(small), ranks)
    scalars = {key: value for key, value in small.items() if key.startswith(OPTIMIZER)}
    ranks.agree(lambda: _check_small(where, found, target, keys, small))
    _restart(state, found.record, keys, small)
    entries = state.weights()
    if target is not None:
        target.prepare(scalars)
        entries |= target.entries()
    _read(where, found, entries, ranks)
    for pool in state.pools:
        for parameter in pool.parameters.values():
            pool.clear_padding(parameter)
    if target is not None:
        target.commit()
    return {} if found.record is None else found.record.get("extra", {})


def _restart(state: TrainingState, record: dict[str, Any] | None, keys: Keys, small: Mapping[str, Tensor]) -> None:
    """Restore step and load history; on an equal mesh also owners and cost model: the run resumes bit by bit."""
    if record is None:
        state.engine.resume(0, None, None)
        return
    plans: dict[str, dict[str, NDArray[np.int64]]] = {
        layer: {key: small[entry].numpy() for key, entry in entries.items()} for layer, entries in keys.items()
    }
    for layer in state.engine.layers:  # no device holds more copies than there are experts
        slots = plans[layer.name]["slots"]
        np.minimum(slots, max(MOST_AUTOMATIC_SLOTS, layer.num_experts), out=slots)
    state.engine.resume(record["step"], plans, CostModel(**record["cost"]) if record["mesh"] == state.mesh else None)


# Checks that run before anything is overwritten.


@dataclass(frozen=True)
class Found:
    """A checkpoint to load, whose files have been verified.

    Attributes:
        folder: folder of the checkpoint.
        metadata: DCP metadata of its tensors.
        record: everything that is not a tensor; None for a checkpoint of another program.
    """

    folder: Path
    metadata: Metadata
    record: dict[str, Any] | None

    @property
    def tensors(self) -> Mapping[str, TensorStorageMetadata]:
        """Metadata of each tensor by name."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _verified(path: Path, ranks: Ranks) -> Path:
    folder = find(path)
    verify(folder, ranks.rank, ranks.size)
    return folder


def _checked(
    where: str, found: Found, state: TrainingState, optimizer: Optimizer | None
) -> tuple[OptimizerTarget | None, Keys]:
    """Check that everything to be read exists and fits; return the optimizer to load into and the planners' entries."""
    weights, saved = state.weights(), found.tensors
    if found.record is not None:
        check_record(f"checkpoint {found.folder}: file {RECORD} is damaged", found.record)
    _check_no_bytes(where, found, weights)
    _check_weights(where, saved, weights)
    target = None if optimizer is None else _target(where, found, state, optimizer)
    keys: Keys = {} if found.record is None else state.plan_keys(found.record["mesh"][1])
    names = {*weights}
    if found.record is not None:
        experts = {layer.name: layer.num_experts for layer in state.engine.layers}
        names |= set(planner_entries(where, saved, keys, experts, found.record["mesh"][2]))
    if target is not None:
        names |= {name for name in saved if name.startswith(OPTIMIZER)}
    check_stored(where, found.metadata, sorted(names), _file_sizes(where, found, names))
    return target, keys


def _check_no_bytes(where: str, found: Found, weights: Mapping[str, Entry]) -> None:
    """ValueError if an entry to be read is stored as bytes: DCP would unpickle it, which can run any code."""
    for name, entry in found.metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) and (name in weights or name.startswith((OPTIMIZER, PLANS))):
            raise ValueError(f"{where}: {name} is stored as pickled bytes, which are not read; it must be a tensor")


def _check_weights(where: str, saved: Mapping[str, TensorStorageMetadata], weights: Mapping[str, Entry]) -> None:
    own = [name for name in saved if not name.startswith((OPTIMIZER, PLANS))]
    compare_names(where, own, weights, "parameters and buffers")
    # Experts first: a different number of experts also changes the router's shape, but that error would say less.
    for name, value in sorted(weights.items(), key=lambda item: not isinstance(item[1], ExpertRows)):
        _check_same(where, name, saved[name], value)


def _target(where: str, found: Found, state: TrainingState, optimizer: Optimizer) -> OptimizerTarget:
    if found.record is None or found.record["optimizer"] is None:
        raise ValueError(f"{where}: the checkpoint was saved without an optimizer; pass optimizer=None to load weights")
    states = {key: value for key, value in found.tensors.items() if key.startswith(OPTIMIZER)}
    return OptimizerTarget(state, optimizer, found.record["optimizer"], states)


def _file_sizes(where: str, found: Found, names: Collection[str]) -> dict[str, int]:
    """Size in bytes of each file that holds one of those tensors; ValueError if the manifest does not list the file."""
    files = read_files(found.folder)
    used = {info.relative_path for index, info in found.metadata.storage_data.items() if index.fqn in names}
    if files is not None and (unknown := used - files.keys()):
        raise ValueError(f"{where}: {METADATA} names files that {MANIFEST} does not: {listed(unknown)}")
    return {name: file_of(found.folder, name).stat().st_size for name in used}


def _check_small(
    where: str, found: Found, target: OptimizerTarget | None, keys: Keys, small: Mapping[str, Tensor]
) -> None:
    """Check the values of the small entries, which were read before the model is overwritten."""
    if target is not None:
        target.check_scalars({key: value for key, value in small.items() if key.startswith(OPTIMIZER)})
    if found.record is not None:
        check_planners(where, keys, small, found.record["mesh"][2])


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
    """ValueError if a name of the model begins with a prefix reserved for other entries."""
    for name in names:
        if name.startswith((OPTIMIZER, PLANS)):
            raise ValueError(f"{where}: {name} begins with {OPTIMIZER!r} or {PLANS!r}; rename the submodule")


# Calls of torch.distributed.checkpoint.
def _empty(saved: TensorStorageMetadata) -> Tensor:
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def _read(where: str, found: Found, entries: dict[str, Entry], ranks: Ranks) -> None:
    """Read the tensors of `entries` from the checkpoint, in place."""
    with _dcp(where):
        dcp.load(
            entries,
            storage_reader=CheckedReader(found.folder, found.metadata),
            planner=ExpertsLoadPlanner(),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )


@contextmanager
def _one_checksum() -> Iterator[None]:
    """Turn off torch.save's CRC-32, since whole files have one already. The setting applies to all threads."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def _dcp(where: str) -> Iterator[None]:
    """Re-raise DCP's failures as OSError (CheckpointException is not an Exception); silence its no-group warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.api.CheckpointException as failure:
            first = min(failure.failures)
            raise OSError(f"{where}: rank {first}: {failure.failures[first][0]!r}") from failure
