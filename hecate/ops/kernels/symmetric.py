"""Rows that the devices of a node read from each other's memory, and the flags by which they say when.

Addresses are valid in this process: a peer's memory is mapped here (`hecate.collectives.shared_memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor

from hecate.ops.kernels.launch import Argument, Launch, ThreadOrder, batches, run

__all__ = ["PULL_BLOCKS", "Flag", "await_flags", "pull_rows", "signal"]

PULL_BLOCKS = 16
"""CTAs, hence SMs, that copy rows: 16 of 512 threads have 1 MiB under way, enough for a link of 450 GB/s and 2 us."""
PULL_BYTES = 65536  # kPullBytes in csrc/cuda/symmetric.cuh
MAX_FLAGS = MAX_PULLS = 128  # kFlags, kPulls
ENGINE_BYTES = 2**20
"""Rows from this size on are pulled by copy engines, which take no SM; many small ones are one launch of the kernel."""

Flag = tuple[int, int]
"""Address of an int64 word that only grows, and the value to set or to wait for."""


def signal(flags: Sequence[Flag], device: torch.device, order: ThreadOrder = "ascending") -> None:
    """Set flags, also on other devices, after everything launched before on the current stream.

    Args:
        flags: each with a larger value than it has.
        device: this rank's device.
        order: of emulated threads.
    """
    for some in batches(flags, MAX_FLAGS):
        run(Launch("symmetric", "signal", 1, (MAX_FLAGS, 1), 0, (len(some), *_columns(some, MAX_FLAGS))), device, order)


def await_flags(
    flags: Sequence[Flag], late: Tensor, timeout: timedelta, device: torch.device, order: ThreadOrder = "ascending"
) -> int | None:
    """Have what is launched next on the current stream wait until every flag has its value; one CTA polls.

    Args:
        flags: in this rank's own memory.
        late: int64 `[1]` on `device`, zero; gets the position of a flag that did not come, plus one.
        timeout: after it the wait ends: on CUDA with an error of the device, since later launches would read rows that
            are not there.
        device: this rank's device.
        order: of emulated threads.

    Returns:
        On the CPU, the position of a flag that did not come; None: all came. On CUDA the host does not wait: None.
    """
    nanoseconds = timeout // timedelta(microseconds=1) * 1000
    for first, some in zip(range(0, len(flags), MAX_FLAGS), batches(flags, MAX_FLAGS), strict=True):
        args: tuple[Argument, ...] = (len(some), nanoseconds, late, *_columns(some, MAX_FLAGS))
        run(Launch("symmetric", "await", 1, (MAX_FLAGS, 1), 0, args), device, order)
        if device.type == "cpu" and int(late):
            return first + int(late) - 1
    return None


def pull_rows(
    pulls: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    engine_bytes: int | None = None,
    order: ThreadOrder = "ascending",
) -> None:
    """Copy rows, `source` to `target`, on the current stream.

    Args:
        pulls: pairs (source, target) of flat contiguous tensors of one dtype and length; sources may be peers' memory.
        device: this rank's device.
        engine_bytes: rows of at least that many bytes are copied by copy engines, one call for each; None: on CUDA
            `ENGINE_BYTES`, on the CPU all by the kernel.
        order: of emulated threads.
    """
    if engine_bytes is None and device.type != "cpu":
        engine_bytes = ENGINE_BYTES
    small = []
    for source, target in pulls:
        if source.dtype != target.dtype or source.shape != target.shape:
            raise ValueError(
                f"pull_rows: source {source.dtype} {tuple(source.shape)}, target {target.dtype} {tuple(target.shape)}; "
                "they must be equal"
            )
        if engine_bytes is not None and source.nbytes >= engine_bytes:
            target.copy_(source)
        elif source.nbytes:
            small.append((source.data_ptr(), target.data_ptr(), source.nbytes))
    for some in batches(small, MAX_PULLS):
        blocks = min(PULL_BLOCKS, sum(-(-size // PULL_BYTES) for _, _, size in some))
        run(Launch("symmetric", "pull", blocks, (512, 1), 0, (len(some), *_columns(some, MAX_PULLS))), device, order)


def _columns(rows: Sequence[tuple[int, ...]], length: int) -> list[list[int]]:
    """The fields of rows, each padded to `length` with zeros."""
    return [[*column, *[0] * (length - len(rows))] for column in zip(*rows, strict=True)]
