"""Which parts of a model the ranks run in a forward pass: under FSDP2 these must be the same on all ranks.

A rank whose batch has no images skips the vision tower. FSDP2 would then match the all-gather of one rank's vision
block with that of another rank's text block: gloo aborts the process, NCCL hangs. So the ranks compare the tower that
they begin, before FSDP2 gathers its first block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from hecate.names import original_modules
from hecate.private_torch import in_backward
from hecate.ranks.messages import everyones
from hecate.runtime.tokens.counts import REMEDY

__all__ = ["Towers"]


class Towers:
    """Compares the towers that ranks begin. A model with one tower sends nothing.

    A tower is a list of units that FSDP2 gathers one by one, e.g. "vision.layers" and "text.layers".

    Args:
        model: the model under FSDP2.
        units: the modules that FSDP2 gathers one by one.
    """

    def __init__(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        names = {id(module): name for name, module in original_modules(model).items()}
        tower_of = {id(unit): re.sub(r"\.?\b\d+\b", "", names[id(unit)]) for unit in units}
        self._names = sorted(set(tower_of.values()))
        self._begun: set[int] = set()  # in this pass
        for unit in units if len(self._names) > 1 else ():
            number = self._names.index(tower_of[id(unit)])
            # Before FSDP2's own hook, which gathers the unit.
            unit.register_forward_pre_hook(lambda module, args, n=number: self._begin(n), prepend=True)

    def new_pass(self) -> None:
        """A forward pass begins: no tower has been begun."""
        self._begun.clear()

    @torch.compiler.disable
    def _begin(self, number: int) -> None:
        """A unit of tower `number` is called. Collective at the first call of a tower in a pass.

        Raises:
            RuntimeError: ranks begin different towers; on all ranks.
        """
        if number in self._begun or in_backward():
            return
        self._begun.add(number)
        group = dist.group.WORLD
        assert group is not None
        self._check(everyones(number, group))

    def _check(self, reached: Sequence[int]) -> None:
        if len(set(reached)) == 1:
            return
        ranks = {name: [rank for rank, n in enumerate(reached) if n == i] for i, name in enumerate(self._names)}
        who = " and ".join(f"{name} on ranks {on}" for name, on in ranks.items() if on)
        raise RuntimeError(
            f"fully_shard: {who} come next in this forward pass; under dense='fsdp' all ranks must run the same parts "
            f"of the model; {REMEDY}"
        )
