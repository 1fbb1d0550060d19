"""Memory for copies: how many fit, and two buffers that all layers use in turn."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.ranks.messages import all_reduce
from hecate.runtime.arena import Arena
from hecate.runtime.setup import Setup

__all__ = ["MOMENTS_BYTES", "SharedBuffers", "free_memory", "memory_slots"]

MOMENTS_BYTES = 8
"""Bytes of optimizer state per trained element: the two float32 moments of Adam."""


class Tenant(Protocol):
    """Something that uses a shared buffer."""

    def release(self) -> None:
        """Stop using the buffer."""


class SharedBuffers:
    """Two buffers that the copies of all layers use in turn, for re-materialization (paper, section 4.2)."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._bytes: list[Tensor] = []  # uint8 [1, num_bytes], both or none
        self._tenant: list[Tenant | None] = [None, None]

    def reserve(self, num_bytes: int) -> None:
        """Make both buffers at least that large. Only between steps: during a step autograd may hold views of them."""
        if self.num_bytes < 2 * num_bytes:
            self.evict()
            self._bytes = []
            self._bytes = [self._arena.empty(1, num_bytes, torch.uint8) for _ in range(2)]

    @property
    def num_bytes(self) -> int:
        """Bytes that both buffers take."""
        return sum(buffer.numel() for buffer in self._bytes)

    def free(self) -> None:
        """Give the memory of both back; `reserve` allocates it anew. Only between steps."""
        self.evict()
        self._bytes = []

    def lend(self, tenant: Tenant, turn: int, num_bytes: int) -> Tensor:
        """Lend one of the buffers to `tenant`; the tenant before it is released.

        Args:
            tenant: the new user.
            turn: even or odd: which buffer.
            num_bytes: bytes needed, at most what was reserved.

        Returns:
            uint8 `[num_bytes]`.
        """
        before, self._tenant[turn % 2] = self._tenant[turn % 2], tenant
        if before is not None and before is not tenant:
            before.release()
        memory = self._bytes[turn % 2] if num_bytes else self._arena.empty(1, 0, torch.uint8)
        return memory[0, :num_bytes]

    def evict(self) -> None:
        """Release both buffers, for example because the weights have changed."""
        for tenant in self._tenant:
            if tenant is not None:
                tenant.release()
        self._tenant = [None, None]


def memory_slots(setup: Setup, num_experts: int, expert_bytes: int, devices_per_node: int) -> int:
    """Number of copies of one layer that a device may hold, the same on all ranks. Collective.

    This is `config.memory_slots`, at most the layer's number of experts. For "auto" it is what fits in `memory_share`
    of the free memory, at most 2. It is 0 on one device and for a policy that copies nothing, such as "ep".

    Args:
        setup: the inspected model and config.
        num_experts: experts of the layer.
        expert_bytes: bytes of one copy.
        devices_per_node: processes that share the host memory, if experts are on the CPU.
    """
    config, device = setup.config, setup.device
    if setup.num_devices == 1 or not setup.policy.copies:
        return 0
    if config.memory_slots != "auto":
        return min(config.memory_slots, num_experts)
    free = free_memory(device, setup.sharers if device.type == "cuda" else devices_per_node)
    alive = min(2, len(setup.layers)) if config.rematerialize else len(setup.layers)
    slots = torch.tensor(min(2, int(free * config.memory_share) // max(1, alive * expert_bytes)), device=device)
    all_reduce(slots, op=dist.ReduceOp.MIN)  # the smallest over all ranks, so that all make the same plan
    return int(slots)


def free_memory(device: torch.device, processes: int) -> int:
    """Bytes that are free on `device` for this process; for the CPU what Linux reports as available (MemAvailable).

    Args:
        device: device of the experts.
        processes: how many processes share the GPU or, if the device is the CPU, the host memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // processes
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return available // processes
