"""Which device this process trains on, and which other processes of the job have the same one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

__all__ = ["own_device", "settle_device"]


def own_device(kind: str, local_rank: int | None = None) -> torch.device:
    """The device of this process. On CUDA it becomes the current one, unless the process has chosen one already.

    It follows DeviceMesh: a process that has not touched CUDA yet gets the GPU of its number on this machine. If
    code asks `torch.cuda.current_device()` before that, it is GPU 0 on every rank, and DeviceMesh then leaves it so.

    Args:
        kind: device type, e.g. "cuda".
        local_rank: number of this process on its machine; default: LOCAL_RANK, which launchers set, or without it
            the rank in the process group modulo the number of GPUs.

    Raises:
        ValueError: the machine shows this process fewer GPUs than that.
    """
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_initialized():
        torch.cuda.set_device(_gpu(torch.cuda.device_count(), local_rank))
    return torch.device("cuda", torch.cuda.current_device())


def _gpu(count: int, local_rank: int | None) -> int:
    if count == 1:
        return 0  # a scheduler has given each process its own one, or they share it, which `settle_device` finds
    if local_rank is None:
        grouped = dist.is_available() and dist.is_initialized()
        local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank() % max(1, count) if grouped else 0))
    if local_rank >= count:
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own, the machine shows it {count}; start at most "
            "one process per GPU, or choose a GPU by torch.cuda.set_device first"
        )
    return local_rank


def settle_device(
    kind: str, backend: str, store: dist.Store, rank: int, world_size: int, local_rank: int | None = None
) -> tuple[torch.device, int]:
    """`own_device`, and how many processes of the job have the same one. Collective.

    The ranks compare by the store, with a number of messages per rank that does not depend on the world size: NCCL
    itself fails or hangs if two ranks have one GPU, so no collective could carry this.

    Args:
        kind: device type that this rank trains on.
        backend: backend of the process group for it.
        store: store that all ranks share.
        rank: this rank.
        world_size: number of ranks.
        local_rank: see `own_device`.

    Raises:
        ValueError: ranks train on devices of different types, a rank has no GPU, or two have the same one under NCCL;
            on all ranks.
    """
    number = store.add(f"hecate/devices/{rank}", 1)  # of the call
    calls = dist.PrefixStore(f"hecate/devices/call {number}", store)
    device, problem = torch.device(kind), None
    try:
        device = own_device(kind, local_rank)
    except ValueError as error:
        problem = f"rank {rank}: {error}"
    name = _name(device, rank)
    kind_there, first = calls.compare_set("kind", "", f"{kind} on rank {rank}").decode().split(" on rank ")
    if kind_there != kind:
        problem = f"rank {first} trains on {kind_there}, rank {rank} on {kind}; all ranks must use one device type"
    first = calls.compare_set(f"first/{name}", "", str(rank)).decode()
    calls.add(f"all/{name}", 1)
    if problem is None and backend == "nccl" and int(first) != rank:
        problem = (
            f"ranks {first} and {rank} have the same GPU, {device} ({name}); NCCL takes one process per GPU: call "
            "torch.cuda.set_device(LOCAL_RANK) first, or start at most one process per GPU"
        )
    if problem is not None:
        calls.set("problem", problem)
    if calls.add("ranks", 1) == world_size:
        calls.set("complete", "")
    calls.wait(["complete"])
    if calls.check(["problem"]):
        raise ValueError(calls.get("problem").decode())
    return device, calls.add(f"all/{name}", 0)


def _name(device: torch.device, rank: int) -> str:
    """A name that processes on the same GPU have in common, on all machines; without a GPU one per rank."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.index is not None else f"rank {rank}"
