"""Gathers the next block's dense weights while a block runs.

FSDP2 gathers a block's weights when the host reaches the block. Inside the block before it the host waits for token
counts, so the gather would start when that block is nearly over. Here it starts before the block's attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["Prefetch"]


class Prefetch:
    """Prefetch along the chains of blocks in a model, such as its list of layers.

    Args:
        model: FSDP2 has been applied to its blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._next: dict[FSDPModule, FSDPModule] = {}
        self._ran: set[FSDPModule] = set()
        self._backward = False
        for block, following in _chained(model):
            block.set_modules_to_forward_prefetch([following])
            self._next[block] = following
        for block in {*self._next, *self._next.values()}:
            assert isinstance(block, nn.Module)
            block.register_forward_pre_hook(self._runs)

    def settle(self) -> None:
        """Between passes: free what was gathered for blocks that did not run, e.g. because the model left early.

        FSDP2 would use those weights in the next pass that reaches the block, after an optimizer step perhaps.
        """
        self._backward = False
        waiting = [following for block, following in self._next.items() if block in self._ran]
        for block in waiting:
            if block not in self._ran:
                block.unshard()
                block.reshard()
        self._ran.clear()

    def begin_backward(self) -> None:
        """Blocks that run from now on are recomputed, for which FSDP2 gathers nothing ahead."""
        self._backward = True

    @torch.compiler.disable
    def _runs(self, block: nn.Module, args: tuple[object, ...]) -> None:
        assert isinstance(block, FSDPModule)
        if not self._backward:
            self._ran.add(block)


def _chained(model: nn.Module) -> Iterator[tuple[FSDPModule, FSDPModule]]:
    """Pairs of blocks of which the second usually runs after the first: neighbours in a list of modules."""
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            yield from pairwise(child for child in container if isinstance(child, FSDPModule))
