"""torch's collectives and messages, for tensors of any device. The only way from Hecate to them, but for transports.

If gloo is a group's backend for an accelerator, tensors are staged through pinned host memory: gloo has some of its
collectives for CUDA, but neither messages nor all. That is how several processes can share one GPU, which NCCL refuses.
The group's backend for the device decides. Staged calls end before they return; the others are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.ranks.backend import backend_of, small_tensor_device

__all__ = [
    "HostCopy",
    "all_gather",
    "all_gather_into",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "everyones",
    "from_host",
    "host_like",
    "recv",
    "send",
    "staged",
    "to_host",
]

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def staged(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether tensors on `device` travel through host memory in `group`."""
    return device.type != "cpu" and backend_of(group, device.type) == "gloo"


def host_like(tensor: Tensor) -> Tensor:
    """Uninitialized host memory for a tensor of that shape and dtype, pinned if the tensor is on CUDA."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Host copies, complete: the host waits for the current stream."""
    copies = [host_like(tensor) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


class HostCopy:
    """A host copy on its way. Making one launches it on the current stream; the host does not wait.

    Args:
        tensor: what is copied; it may be freed at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy = host_like(tensor)
        self._copy.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.current_stream(tensor.device).record_event() if tensor.device.type == "cuda" else None

    def wait(self) -> Tensor:
        """The copy, complete: the host waits for it, and for nothing that was launched after it."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy


def from_host(copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Write host copies into their tensors, in the order of the current stream; the host does not wait.

    The copies may be dropped at once: torch's allocator of pinned memory gives it out again only after the stream.
    """
    for copy, tensor in zip(copies, tensors, strict=True):
        tensor.copy_(copy, non_blocking=True)


@contextmanager
def _carried(
    group: dist.ProcessGroup | None, read: Sequence[Tensor], written: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor], bool]]:
    """The tensors that a collective reads and writes: the same memory, or host copies that are written back at the end.

    The third is whether they are host copies; then the collective must have ended when the block ends.

    They are detached: a backend's thread may hold them a moment longer than the caller, and a graph that ended there
    would run finalizers beside the thread that trains.
    """
    group = dist.group.WORLD if group is None else group
    tensors = [*read, *written]
    if group is None or not tensors or not staged(group, tensors[0].device):
        yield [tensor.detach() for tensor in read], [tensor.detach() for tensor in written], False
        return
    ins = to_host([tensor.detach() for tensor in read])
    of = {id(tensor): copy for tensor, copy in zip(read, ins, strict=True)}
    outs = [of[id(tensor)] if id(tensor) in of else host_like(tensor) for tensor in written]
    yield ins, outs, True
    from_host(outs, [tensor.detach() for tensor in written])


def all_reduce(
    tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Callable[[], object]:
    """`dist.all_reduce`; returns what waits for it, which without `async_op` has nothing to do any more."""
    with _carried(group, [tensor], [tensor]) as ([carried], _, on_host):
        work = dist.all_reduce(carried, op=op, group=group, async_op=async_op and not on_host)
    return (lambda: None) if work is None else work.wait


def broadcast(tensor: Tensor, group: dist.ProcessGroup | None = None, group_src: int = 0) -> None:
    """`dist.broadcast` from rank `group_src` of the group."""
    with _carried(group, [tensor], [tensor]) as ([carried], _, _):
        dist.broadcast(carried, group=group, group_src=group_src)


def all_gather(rows: Sequence[Tensor], row: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """`dist.all_gather` of every rank's `row` into `rows`."""
    with _carried(group, [row], rows) as ([carried], into, _):
        dist.all_gather(into, carried, group=group)


def everyones(number: int, group: dist.ProcessGroup) -> list[int]:
    """The number of every rank of the group, by rank. Collective; the host waits."""
    row = torch.tensor([number], device=small_tensor_device(group))
    rows = [torch.empty_like(row) for _ in range(group.size())]
    all_gather(rows, row, group)
    return torch.cat(rows).tolist()


def all_gather_into(
    table: Tensor, row: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Callable[[], object]:
    """Gather every rank's `row` into one tensor; returns what waits for it, which without `async_op` does nothing.

    torch 2.13 has given `dist.all_gather_into_tensor` another name and warns of the old one.
    """
    with _carried(group, [row], [table]) as ([carried], [into], on_host):
        gather = getattr(dist, GATHER)
        work = gather(into, carried, group=group, async_op=async_op and not on_host)
    return (lambda: None) if work is None else work.wait


def all_to_all(
    out: Tensor,
    rows: Tensor,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Callable[[], object]:
    """`dist.all_to_all_single`; `received` and `sent` are the rows from and to each rank, None for equally many.

    Returns what waits for it, which without `async_op` has nothing to do any more.
    """
    from_each, to_each = (None if numbers is None else list(numbers) for numbers in (received, sent))
    with _carried(group, [rows], [out]) as ([carried], [into], on_host):
        later = async_op and not on_host
        work = dist.all_to_all_single(into, carried, from_each, to_each, group=group, async_op=later)
    return (lambda: None) if work is None else work.wait


def send(tensor: Tensor, group: dist.ProcessGroup | None, group_dst: int) -> None:
    """`dist.send` of the tensor's bytes, so that every dtype travels on every backend."""
    with _carried(group, [tensor], []) as ([carried], _, _):
        dist.send(carried.view(torch.uint8), group=group, group_dst=group_dst)


def recv(tensor: Tensor, group: dist.ProcessGroup | None, group_src: int) -> None:
    """`dist.recv` of what `send` sent."""
    with _carried(group, [], [tensor]) as (_, [into], _):
        dist.recv(into.view(torch.uint8), group=group, group_src=group_src)
