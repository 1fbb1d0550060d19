"""The memory of copies: how many fit, what they take, and two buffers that serve all layers in turn."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.runtime.setup import Setup

__all__ = ["CopiesMemory", "SharedBuffers", "memory_slots"]


class CopiesMemory:
    """Bytes that buffers of copies take on this device, now and at most."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def add(self, num_bytes: int) -> None:
        """Count an allocation, or with a negative number a release."""
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


class Tenant(Protocol):
    """Whoever has a shared buffer."""

    def release(self) -> None:
        """Use it no more."""


class SharedBuffers:
    """Two buffers that serve the copies of all layers in turn, for re-materialization (paper, section 4.2)."""

    def __init__(self, memory: CopiesMemory, device: torch.device) -> None:
        self._memory = memory
        self._device = device
        self._bytes = [torch.empty(0, dtype=torch.uint8)] * 2
        self._tenant: list[Tenant | None] = [None, None]

    def reserve(self, num_bytes: int) -> None:
        """Make both at least that large. Between steps only: autograd may keep views while one runs."""
        if self._bytes[0].numel() < num_bytes:
            self.evict()
            self._memory.add(2 * (num_bytes - self._bytes[0].numel()))
            with torch.inference_mode(False):  # an evaluation may come first; training must be able to save views
                self._bytes = [torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]

    def lend(self, tenant: Tenant, turn: int, num_bytes: int) -> Tensor:
        """Bytes of one of them; whoever had it holds nothing any more."""
        before, self._tenant[turn % 2] = self._tenant[turn % 2], tenant
        if before is not None and before is not tenant:
            before.release()
        return self._bytes[turn % 2][:num_bytes]

    def evict(self) -> None:
        """Release both, for example because the weights changed."""
        for tenant in self._tenant:
            if tenant is not None:
                tenant.release()
        self._tenant = [None, None]


def memory_slots(setup: Setup, num_experts: int, expert_bytes: int, devices_per_node: int) -> int:
    """Copies of one layer that a device has room for, the same on all ranks. Collective.

    `config.memory_slots`, but no more than the layer has experts, or for "auto" what fits in `memory_share` of the free
    memory, at most 2; none if the policy copies nothing.

    Args:
        setup: of the model.
        num_experts: of the layer.
        expert_bytes: of one copy.
        devices_per_node: processes that share the memory of a CPU.
    """
    config, device = setup.config, setup.device
    if setup.num_devices == 1 or config.policy == "ep":
        return 0
    if config.memory_slots != "auto":
        return min(config.memory_slots, num_experts)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory() // devices_per_node
    alive = min(2, len(setup.layers)) if config.rematerialize else len(setup.layers)
    slots = torch.tensor(min(2, int(free * config.memory_share) // max(1, alive * expert_bytes)), device=device)
    dist.all_reduce(slots, op=dist.ReduceOp.MIN)  # the smallest of all ranks, so that they plan the same
    return int(slots)


def _available_memory() -> int:
    """Bytes that Linux says new allocations may use."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
