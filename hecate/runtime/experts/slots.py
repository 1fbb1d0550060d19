"""Lowers `memory_slots="auto"` to what fits beside the rest of training.

`memory_slots` measures free memory when neither optimizer state nor gradients exist. This module first takes an
estimate of both off, and measures again in the first steps, when they exist. What `memory_share` leaves free (80 % by
default) is for activations and gathered dense weights. Slots are only lowered, and only between steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from hecate.experts import POOL_PREFIX
from hecate.ranks.messages import all_reduce
from hecate.runtime.arena import Arena
from hecate.runtime.experts.buffers import MOMENTS_BYTES, SharedBuffers, free_memory
from hecate.runtime.experts.layer import LayerExperts
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.setup import Setup
from hecate.values.local import local_tensor

__all__ = ["STEPS_TO_MEASURE", "SlotsWatch", "reserved_memory"]

STEPS_TO_MEASURE = 3
"""Steps before which memory is measured again: by then optimizer state and gradients have their final size."""


def reserved_memory(setup: Setup, model: nn.Module, pools: Iterable[ExpertPool]) -> int:
    """Bytes on this device that gradients and optimizer state will take, by estimate.

    Each trained element has a gradient in its own dtype and two float32 moments.

    Args:
        setup: the inspected model and config.
        model: the model with pools, before its dense part is sharded.
        pools: the pools that own the experts.
    """
    owned = [local_tensor(p) for pool in pools for _, p in pool.trainable()]
    named = (pair for pair in model.named_parameters() if not pair[0].startswith(POOL_PREFIX))
    stacked = setup.stacked()
    dense = [p for _, p in named if p.requires_grad and id(p) not in stacked]
    shards = setup.num_devices if setup.config.dense == "fsdp" else 1
    return _state_bytes(owned) + _state_bytes(dense) // shards


def _state_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * (t.element_size() + MOMENTS_BYTES) for t in tensors)


class SlotsWatch:
    """Lowers the memory slots of all layers when less memory is free than they were chosen for.

    Args:
        setup: the inspected model and config.
        layers: the experts of each MoE layer.
        shared: the buffers of re-materialization, or None.
        arena: the memory of copies.
    """

    def __init__(
        self, setup: Setup, layers: Sequence[LayerExperts], shared: SharedBuffers | None, arena: Arena
    ) -> None:
        self._setup = setup
        self._layers = tuple(layers)
        self._shared = shared
        self._arena = arena
        self._steps = 0
        # Memory of copies that stay is allocated at once, so lowering their number later would free none.
        auto = setup.config.memory_slots == "auto" and not setup.policy.keeps
        self._auto = auto and any(layer.memory_slots for layer in layers)

    def before_step(self) -> None:
        """Measure before the first steps but the very first, when no copies are held. Collective over all ranks."""
        if 0 < self._steps <= STEPS_TO_MEASURE:
            self.lower(reserved=0)
        self._steps += 1

    def lower(self, reserved: int) -> None:
        """Lower the slots to what fits in `memory_share` of the free memory. Collective over all ranks.

        Args:
            reserved: bytes of the free memory that something else will take.
        """
        if not self._auto:
            return
        free = max(0, self._free() - reserved - self._casts()) * self._setup.config.memory_share
        alive = min(2, len(self._layers)) if self._setup.config.rematerialize else len(self._layers)
        fit = [int(free) // max(1, alive * _copy_bytes(layer)) for layer in self._layers]
        slots = torch.tensor(fit, dtype=torch.int64, device=self._setup.device)
        all_reduce(slots, op=dist.ReduceOp.MIN)  # so that all ranks make the same plans
        lowered = False
        for layer, most in zip(self._layers, slots.tolist(), strict=True):
            lowered |= most < layer.memory_slots
            layer.memory_slots = min(layer.memory_slots, most)
        if lowered and self._shared is not None:
            self._shared.free()
        if lowered:
            self._arena.free()

    def _free(self) -> int:
        """Bytes that copies could be allocated from here: free memory, the copies' own arena, and torch's cache."""
        held, device = self._arena.num_bytes, self._setup.device
        if device.type != "cuda":
            return held + free_memory(device, self._layers[0].comms.topology.devices_per_node)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return held + cached + free_memory(device, self._setup.sharers)

    def _casts(self) -> int:
        """Bytes that casts of owned rows take: of all layers, or with re-materialization of two at a time."""
        sizes = [layer.num_owned * _copy_bytes(layer) if layer.casts else 0 for layer in self._layers]
        return sum(sizes) if self._shared is None else 2 * max(sizes)


def _copy_bytes(layer: LayerExperts) -> int:
    return layer.layout.numel * layer.dtypes.param.itemsize
