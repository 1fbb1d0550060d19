"""Recorded loads: counts per (step, layer, device, expert) in one `.npz` that grows while training runs.

Format "hecate-trace", version 1, a zip of `.npy` members that `numpy.load` opens:

- `meta`: one JSON string with `format`, `version`, `num_devices`, `devices_per_node`, `experts` (number per layer).
- `steps.<chunk>`: int64 `[n]`, the step numbers of one chunk; chunks are numbered from 000000.
- `layer<l>.<chunk>`: unsigned integers `[n, num_devices, experts of layer l]` of the narrowest type that fits.

The counts of a step are summed over its micro-batches. If a step occurs twice (the run was resumed from an earlier
checkpoint), the later one counts. The file is a valid archive after every chunk.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecate.loads.counts import check_counts
from hecate.placement import Topology

__all__ = ["Trace", "TraceWriter", "read_trace"]

Int64 = NDArray[np.int64]
FORMAT, VERSION = "hecate-trace", 1


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded loads.

    Attributes:
        topology: which devices share a node.
        steps: int64 `[steps]`, step numbers in ascending order.
        layers: per MoE layer, int64 `[steps, num_devices, num_experts of the layer]`.
    """

    topology: Topology
    steps: Int64
    layers: tuple[Int64, ...]


class TraceWriter:
    """Appends steps to a trace. Used by one rank, as a context manager that writes buffered steps when it is left.

    Args:
        path: the `.npz` file; an existing trace with the same topology and layers is continued.
        topology: which devices share a node.
        experts: number of experts per layer.
        chunk: number of steps to buffer between writes.
    """

    def __init__(self, path: str | Path, topology: Topology, experts: Sequence[int], chunk: int = 50) -> None:
        self._path, self._topology, self._experts, self._limit = Path(path), topology, list(experts), chunk
        self._steps: list[int] = []
        self._counts: list[list[Int64]] = [[] for _ in experts]
        if self._path.exists():
            with np.load(self._path) as file:
                found, wanted = json.loads(str(file["meta"])), self._meta()
                if found != wanted:
                    raise ValueError(f"trace {self._path}: holds {found}, cannot be continued with {wanted}")
                self._chunks = sum(name.startswith("steps.") for name in file.files)
        else:
            self._chunks = 0
            self._write({"meta": np.array(json.dumps(self._meta()))})

    def append(self, step: int, counts: Sequence[Int64]) -> None:
        """Record one step: int64 `[num_devices, num_experts]` per layer. ValueError for wrong shapes and counts < 0."""
        if len(counts) != len(self._experts):
            raise ValueError(f"trace: counts of {len(counts)} layers, must be {len(self._experts)}")
        checked = [check_counts(c, self._topology.num_devices, e) for c, e in zip(counts, self._experts, strict=True)]
        self._steps.append(step)
        for layer, array in zip(self._counts, checked, strict=True):
            layer.append(array.copy())
        if len(self._steps) >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write the buffered steps as one chunk."""
        if not self._steps:
            return
        members: dict[str, NDArray[Any]] = {f"steps.{self._chunks:06d}": np.array(self._steps, dtype=np.int64)}
        for index, layer in enumerate(self._counts):
            members[f"layer{index}.{self._chunks:06d}"] = _narrow(np.stack(layer))
        self._write(members)
        self._steps.clear()
        for layer in self._counts:
            layer.clear()
        self._chunks += 1

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()

    def _meta(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "num_devices": self._topology.num_devices,
            "devices_per_node": self._topology.devices_per_node,
            "experts": self._experts,
        }

    def _write(self, members: Mapping[str, NDArray[Any]]) -> None:
        """Append to the file; if that fails, as on a full disk, the file is what it was."""
        start, directory = self._directory()
        try:
            with zipfile.ZipFile(self._path, "a", zipfile.ZIP_DEFLATED) as archive:
                for name, array in members.items():
                    data = io.BytesIO()
                    np.save(data, array, allow_pickle=False)
                    archive.writestr(f"{name}.npy", data.getvalue())
        except BaseException:
            with self._path.open("r+b") as file:
                file.seek(start)
                file.write(directory)
                file.truncate()
            raise

    def _directory(self) -> tuple[int, bytes]:
        """Where the archive's directory begins, which new members overwrite, and the file from there on."""
        if not self._path.exists():
            return 0, b""
        with zipfile.ZipFile(self._path) as archive:
            start = archive.start_dir
        with self._path.open("rb") as file:
            file.seek(start)
            return start, file.read()


def read_trace(path: str | Path) -> Trace:
    """Read the trace in `path`; ValueError if it is not a trace or has another version."""
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
        if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"trace {path}: format {meta.get('format')!r} version {meta.get('version')!r}, "
                f"must be {FORMAT!r} version {VERSION}"
            )
        chunks = sorted(name.split(".")[1] for name in file.files if name.startswith("steps."))
        topology = Topology(meta["num_devices"], meta["devices_per_node"])
        steps = _joined([file[f"steps.{chunk}"] for chunk in chunks], (0,))
        last = {int(step): index for index, step in enumerate(steps)}
        kept = np.array([last[step] for step in sorted(last)], dtype=np.int64)
        layers = [
            _joined([file[f"layer{index}.{chunk}"] for chunk in chunks], (0, topology.num_devices, experts))[kept]
            for index, experts in enumerate(meta["experts"])
        ]
    return Trace(topology, steps[kept], tuple(layers))


def _joined(parts: Sequence[NDArray[np.integer]], empty: tuple[int, ...]) -> Int64:
    return np.concatenate([np.zeros(empty, dtype=np.int64), *(part.astype(np.int64) for part in parts)])


def _narrow(array: Int64) -> NDArray[np.unsignedinteger]:
    for dtype in (np.uint8, np.uint16, np.uint32):
        if array.max(initial=0) <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array.astype(np.uint64)
