"""Loads, copies and seconds of every layer and step of a run, in one file that grows by a frame per step.

Format "layers.bin", version 1: the line `MAGIC`, then frames. A frame is a header `<qII` (step, length and CRC-32 of
the payload) and the payload, compressed by zlib. Step -1 marks a frame of JSON that describes the frames after it:
number of devices, devices per node, and names and numbers of experts of the layers. It comes first, and again if a run
goes on with other devices. The payload of a step is `FIELDS` in order, each a numpy type character, an unsigned 32-bit
number of values, and the values, little-endian; integers have the narrowest unsigned type that fits.

A process that is killed leaves an incomplete last frame at most, which readers pass over.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Topology

__all__ = ["DESCRIPTION", "VERBS", "LayersFile", "LayersWriter", "RecordedStep", "Shape"]

MAGIC = b"hecate-layers 1\n"
FRAME = struct.Struct("<qII")
ARRAY = struct.Struct("<cI")
DESCRIPTION = -1
VERBS = ("gather", "reduce", "average", "count", "plan")
"""Labels whose seconds are recorded per layer, see `hecate.labels`."""
FIELDS = ("loads", "before", "after", "copied", "sent", "imbalance", "mispredicted", "seconds")


@dataclass(frozen=True)
class Shape:
    """What does not change between steps.

    Attributes:
        num_devices: devices that share the experts.
        devices_per_node: devices of one node.
        layers: names of the MoE layers.
        experts: number of experts per layer.
    """

    num_devices: int
    devices_per_node: int
    layers: tuple[str, ...]
    experts: tuple[int, ...]

    @classmethod
    def of(cls, topology: Topology, layers: Sequence[Mapping[str, Any]]) -> Shape:
        """Of the `layers` of `FSSDP.stats()`."""
        names, experts = [layer["name"] for layer in layers], [len(layer["loads"]) for layer in layers]
        return cls(topology.num_devices, topology.devices_per_node, tuple(names), tuple(experts))

    def to_json(self) -> bytes:
        """UTF-8 text that `from_json` reads."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Shape:
        """The shape that `to_json` has written."""
        values = json.loads(text)
        return cls(values["num_devices"], values["devices_per_node"], tuple(values["layers"]), tuple(values["experts"]))


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """One step; L layers, D devices.

    Attributes:
        step: number of the step.
        shape: layers and devices.
        loads: int `[sum of the layers' experts]`, tokens of each expert; see `of_layer`.
        before, after: int `[L, D]`, tokens of each device without and with copies.
        copied: int `[copies, 4]`, of the last micro-batch: layer, expert, device, and 1 if made after the gate.
        sent: int `[L]`, bytes for copies and gradients.
        imbalance: float32 `[2, L]`, without and with copies.
        mispredicted: float32 `[L]`, share of tokens at other experts than predicted; NaN without a prediction.
        seconds: float32 `[L, len(VERBS)]`, of rank 0.
    """

    step: int
    shape: Shape
    loads: NDArray[Any]
    before: NDArray[Any]
    after: NDArray[Any]
    copied: NDArray[Any]
    sent: NDArray[Any]
    imbalance: NDArray[np.float32]
    mispredicted: NDArray[np.float32]
    seconds: NDArray[np.float32]

    @classmethod
    def of(cls, step: int, topology: Topology, layers: Sequence[Mapping[str, Any]]) -> RecordedStep:
        """A step with these `layers` of `FSSDP.stats()`."""
        missing = float("nan")
        return cls(
            step=step,
            shape=Shape.of(topology, layers),
            loads=np.concatenate([layer["loads"] for layer in layers]),
            before=np.stack([layer["device_loads_before"] for layer in layers]),
            after=np.stack([layer["device_loads_after"] for layer in layers]),
            copied=np.concatenate([_copied(index, layer) for index, layer in enumerate(layers)]),
            sent=np.array([layer["bytes"] for layer in layers]),
            imbalance=_floats([[layer[f"imbalance_{when}"] for layer in layers] for when in ("before", "after")]),
            mispredicted=_floats([missing if (m := layer["mispredicted"]) is None else m for layer in layers]),
            seconds=_floats([[layer["exposed"].get(verb, 0.0) for verb in VERBS] for layer in layers]),
        )

    def of_layer(self, layer: int) -> NDArray[Any]:
        """Int `[experts of the layer]`, its loads."""
        first = sum(self.shape.experts[:layer])
        return self.loads[first : first + self.shape.experts[layer]]

    def to_bytes(self) -> bytes:
        """The payload of its frame."""
        return zlib.compress(b"".join(_packed(getattr(self, name)) for name in FIELDS), 1)

    @classmethod
    def from_bytes(cls, step: int, shape: Shape, payload: bytes) -> RecordedStep:
        """The step whose payload this is; arrays are read-only."""
        data, at, found = zlib.decompress(payload), 0, {}
        for name in FIELDS:
            kind, count = ARRAY.unpack_from(data, at)
            array = np.frombuffer(data, np.dtype(kind.decode()).newbyteorder("<"), count, at + ARRAY.size)
            found[name], at = array, at + ARRAY.size + array.nbytes
        rows = len(shape.layers)
        shapes = {"before": (rows, -1), "after": (rows, -1), "copied": (-1, 4), "imbalance": (2, rows)}
        shapes["seconds"] = (rows, len(VERBS))
        return cls(step, shape, **{name: array.reshape(shapes.get(name, (-1,))) for name, array in found.items()})


def _floats(values: Any) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def _copied(index: int, layer: Mapping[str, Any]) -> NDArray[np.int64]:
    pairs = layer["copied"]
    return np.column_stack([np.full(len(pairs), index), pairs, layer["calibrated"]]).astype(np.int64)


def _packed(array: NDArray[Any]) -> bytes:
    if array.dtype.kind in "iu":
        largest = int(array.max(initial=0))
        array = array.astype(next(np.dtype(kind) for kind in "BHIQ" if largest <= np.iinfo(np.dtype(kind)).max))
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return ARRAY.pack(array.dtype.char.encode(), array.size) + little.tobytes()


class LayersWriter:
    """Appends steps to a file; used by one rank, as a context manager.

    Args:
        path: the file; frames from `first_step` on, which an earlier process wrote, are removed.
        first_step: number of the next step.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._shape = None if not path.exists() else _cut(path, first_step)
        self._file = path.open("ab", buffering=0)  # what a buffer holds after an error would be written later
        if not self._file.tell():
            self._write(MAGIC)

    def append(self, step: RecordedStep) -> None:
        """Record a step. If that fails, e.g. on a full disk, the file is as before."""
        frames = b"" if step.shape == self._shape else _frame(DESCRIPTION, zlib.compress(step.shape.to_json()))
        self._write(frames + _frame(step.step, step.to_bytes()))
        self._shape = step.shape

    def _write(self, data: bytes) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(start)
            raise

    def __enter__(self) -> LayersWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class LayersFile:
    """The steps of a `layers.bin`; each iteration reads the file anew, one step at a time.

    Attributes:
        path: path of the file.
    """

    path: Path

    def __iter__(self) -> Iterator[RecordedStep]:
        """ValueError names the place of damage, unless it is the end that a killed process has left."""
        shape: Shape | None = None
        for frame in self.frames():
            try:
                if frame.step == DESCRIPTION:
                    shape = frame.shape(self.path)
                    continue
                if shape is None:
                    raise ValueError("layers are not described")
                step = RecordedStep.from_bytes(frame.step, shape, frame.payload)
            except (ValueError, zlib.error, struct.error) as error:
                raise ValueError(f"{self.path}: the frame at byte {frame.start} is damaged ({error})") from error
            yield step

    def frames(self) -> Iterator[Frame]:
        """All whole frames."""
        with self.path.open("rb") as file:
            if not MAGIC.startswith(file.read(len(MAGIC))):
                raise ValueError(f"{self.path}: does not begin with {MAGIC!r}, so it is no record of layers")
            while (frame := _next(file, self.path)) is not None:
                yield frame


@dataclass(frozen=True)
class Frame:
    """A frame as it is in the file, from byte `start` to `end`."""

    step: int
    start: int
    end: int
    payload: bytes

    def shape(self, path: Path) -> Shape:
        """What a description says; ValueError if it is damaged."""
        try:
            return Shape.from_json(zlib.decompress(self.payload))
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise ValueError(f"{path}: the description at byte {self.start} is damaged ({error})") from error


def _frame(step: int, payload: bytes) -> bytes:
    return FRAME.pack(step, len(payload), zlib.crc32(payload)) + payload


def _next(file: BinaryIO, path: Path) -> Frame | None:
    """The next frame; None at the end, or if the process was killed while it wrote what is there."""
    start, header = file.tell(), file.read(FRAME.size)
    if len(header) < FRAME.size:
        return None
    step, length, checksum = FRAME.unpack(header)
    payload = file.read(length)
    if length and len(payload) == length and zlib.crc32(payload) == checksum:
        return Frame(step, start, file.tell(), payload)
    if len(payload) < length or not file.read(1):
        return None
    raise ValueError(
        f"{path}: the frame at byte {start} is damaged, and others follow; the file was changed or lost data"
    )


def _cut(path: Path, first_step: int) -> Shape | None:
    """Remove frames from `first_step` on, and an incomplete one; returns the description that holds at the end."""
    end, shape = len(MAGIC) if path.stat().st_size >= len(MAGIC) else 0, None
    for frame in LayersFile(path).frames():
        if frame.step >= first_step:
            break
        end = frame.end
        if frame.step == DESCRIPTION:
            shape = frame.shape(path)
    with path.open("r+b") as file:
        file.truncate(end)
    return shape
