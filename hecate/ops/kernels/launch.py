"""A kernel launch as data, and the one place that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate._native import run_kernel
from hecate.ops.kernels import cuda
from hecate.ops.upload import upload

__all__ = [
    "THREADS",
    "VECTOR_BYTES",
    "Argument",
    "Launch",
    "ThreadOrder",
    "aligned",
    "batches",
    "blocks_for",
    "cast_name",
    "check_rows",
    "dtype_name",
    "row_block",
    "row_launch",
    "run",
    "to_device",
]

THREADS = 256
"""Threads of a block."""
VECTOR_BYTES = 16
"""Widest access of a thread."""
ThreadOrder = Literal["ascending", "descending", "shuffled"]
"""Order in which emulated threads run; results may not depend on it."""

T = TypeVar("T")
Argument = int | float | Tensor | None | Sequence[Any]

_ORDERS = ("ascending", "descending", "shuffled")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_CPU_PROCESSORS = 2  # few, so that on the CPU, too, blocks go on to further rows
_BLOCKS_PER_PROCESSOR = 16


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        source: file of the kernel in csrc/cuda, without its suffix.
        kernel: name of the entry point.
        blocks: number of blocks; with 0 nothing is launched.
        block: threads of a block, (width, height).
        shared_bytes: bytes of shared memory per block.
        args: the fields of the kernel's argument struct, each of 8 bytes: integers, tensors (their addresses), None
            (a null address), floats, or sequences of these.
    """

    source: str
    kernel: str
    blocks: int
    block: tuple[int, int]
    shared_bytes: int
    args: tuple[Argument, ...]

    def words(self) -> NDArray[np.int64]:
        """The argument struct as 8-byte words."""
        words: list[int] = []
        for argument in self.args:
            _append(words, argument)
        return np.array(words, dtype=np.int64)


def _append(words: list[int], argument: Argument) -> None:
    if argument is None:
        words.append(0)
    elif isinstance(argument, Tensor):
        words.append(argument.data_ptr())
    elif isinstance(argument, float):
        words.append(int(np.array(argument).view(np.int64)))
    elif isinstance(argument, int):
        words.append(int(argument))
    else:
        for item in argument:
            _append(words, item)


def run(launch: Launch, device: torch.device, order: ThreadOrder = "ascending") -> None:
    """Launch on the current stream of `device`, without waiting; on the CPU, run it to its end.

    Args:
        launch: what to run; all its tensors must be on `device`.
        device: CUDA or CPU.
        order: of the emulated threads on the CPU.
    """
    if launch.blocks == 0:
        return
    if device.type == "cpu":
        shape = (launch.blocks, *launch.block, launch.shared_bytes)
        run_kernel(launch.kernel, launch.words(), *shape, _ORDERS.index(order))
    else:
        cuda.launch(
            launch.source, launch.kernel, launch.blocks, launch.block, launch.shared_bytes, launch.words(), device
        )


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def blocks_for(units: int, device: torch.device) -> int:
    """Number of blocks for `units` pieces of work: one per piece, up to what fills the device."""
    return min(units, _BLOCKS_PER_PROCESSOR * _processors(device))


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """`items` in groups of `size`, the last one smaller: a launch takes a fixed number of them by value."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def row_block(width: int, lanes: int) -> tuple[int, int]:
    """Threads (per row, rows) of a block such that a thread has about 4 accesses per row.

    Args:
        width: elements of a row.
        lanes: elements per access.
    """
    accesses = max(1, -(-width // (4 * lanes)))
    threads = min(THREADS, max(8, 1 << (accesses - 1).bit_length()))
    return threads, THREADS // threads


def row_launch(
    source: str,
    kernel: str,
    rows: int,
    width: int,
    itemsize: int,
    args: tuple[Argument, ...],
    device: torch.device,
    shared_bytes: int = 0,
) -> Launch:
    """A launch whose blocks each take several rows at a time.

    Args:
        source: as in `Launch`, like kernel, args and shared_bytes.
        kernel: see there.
        rows: number of rows.
        width: elements of a row.
        itemsize: bytes of the widest element.
        args: see `Launch`.
        device: where it will run.
        shared_bytes: see `Launch`.
    """
    block = row_block(width, VECTOR_BYTES // itemsize)
    return Launch(source, kernel, blocks_for(-(-rows // block[1]), device), block, shared_bytes, args)


def aligned(*rows: Tensor | None) -> bool:
    """Whether all rows of all matrices begin at a multiple of 16 bytes."""
    return all(
        r is None or (r.data_ptr() % VECTOR_BYTES == 0 and r.stride(0) * r.element_size() % VECTOR_BYTES == 0)
        for r in rows
    )


def check_rows(what: str, rows: Tensor) -> None:
    """ValueError unless `rows` is a matrix whose rows are contiguous, as all kernels take them.

    Without elements any strides will do: `contiguous()` leaves them, for example those of `expand`, as they are.
    """
    if rows.dim() != 2 or (rows.numel() and rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"{what}: shape {tuple(rows.shape)}, strides {rows.stride()}; must be a matrix with contiguous rows"
        )


def dtype_name(what: str, dtype: torch.dtype) -> str:
    """Short name of a dtype that kernels compute with.

    Raises:
        TypeError: it is none of float32, bfloat16 and float16.
    """
    if dtype not in _NAMES:
        raise TypeError(f"{what}: dtype {dtype}; the kernels compute in {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


def cast_name(what: str, source: torch.dtype, target: torch.dtype) -> str:
    """Suffix of the kernel that copies rows: the two dtypes, or if they are equal the size of an element.

    Raises:
        TypeError: there is no kernel for this cast.
    """
    if source == target:
        return str(source.itemsize)
    names = (dtype_name(what, source), dtype_name(what, target))
    if "f32" not in names:
        raise TypeError(f"{what}: no kernel casts {source} to {target}, one of them must be torch.float32")
    return "_".join(names)


def to_device(numbers: Sequence[int] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Int64 numbers on `device`; copying them there does not synchronize with it."""
    return upload(torch.from_numpy(np.array(numbers, dtype=np.int64)), device)
