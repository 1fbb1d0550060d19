"""Dense weights that only some ranks use in a pass, as a projection of images if only some batches have images.

FSDP2 reduces those weights of a unit that have a gradient on this rank. If ranks differ, so do the sizes of what they
reduce: gloo waits until its timeout or ends the process, NCCL hangs. Since torch 2.13 FSDP2 can reduce zeros for the
others. Then weights that no rank has used get a gradient of zeros, with which an optimizer would decay them; here
these become None again, as in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hecate.private_torch import reduce_root_last, unsharded
from hecate.ranks.anywhere import anywhere

__all__ = ["Unused"]


class Unused:
    """Lets ranks use different weights of the units that all of them run.

    With torch before 2.13 it does nothing: ranks must use the same weights.

    Args:
        model: the root under FSDP2.
        groups: process groups over which gradients are reduced, one after the other.
        device: of the model.
        widens: whether gradients that `no_sync` accumulates have another dtype than those of a pass.
    """

    def __init__(
        self, model: FSDPModule, groups: Sequence[dist.ProcessGroup], device: torch.device, widens: bool
    ) -> None:
        assert isinstance(model, nn.Module)
        self._model, self._groups, self._device, self._widens = model, groups, device, widens
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._works = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
        self._ran: set[FSDPModule] = set()  # until a pass in which no rank used any of its weights
        self._weights: dict[FSDPModule, list[nn.Parameter]] = {}  # of units that have run
        self._watched: set[nn.Parameter] = set()
        self._used: set[int] = set()  # ids of those that got a gradient since the last reduction
        self._without: list[nn.Parameter] = []  # that had no gradient before this backward pass
        self._accumulated = False
        for unit in self._units if self._works else ():
            assert isinstance(unit, nn.Module)
            unit.register_forward_pre_hook(self._runs)

    @torch.compiler.disable
    def _runs(self, unit: nn.Module, args: object) -> None:
        if torch.is_grad_enabled():
            assert isinstance(unit, FSDPModule)
            self._ran.add(unit)

    def begin_backward(self) -> None:
        """A backward pass begins: the units that ran reduce zeros for weights without a gradient."""
        if not self._works:
            return
        if not self._weights:
            reduce_root_last(self._model)
        for unit in self._ran:
            self._watch(unit)
        # FSDP2 reduces gradients of one dtype only, and makes those zeros in the dtype of a pass.
        fits = not (self._accumulated and self._widens)
        for unit in self._units:
            unit.set_reduce_scatter_unused_params(fits and unit in self._ran, recurse=False)
        weights = (p for unit in self._units if unit in self._ran for p in self._weights[unit])
        self._without = [p for p in weights if p.requires_grad and p.grad is None]

    def _watch(self, unit: FSDPModule) -> None:
        """Notice which weights of `unit` get a gradient; frozen ones, which may be trained later, take no hook."""
        pairs = unsharded(unit)
        self._weights[unit] = [sharded for sharded, _ in pairs]
        for sharded, whole in pairs:
            if whole.requires_grad and sharded not in self._watched:
                self._watched.add(sharded)
                # Without a reference to the model: the cycle would stay, as Python does not see what autograd holds.
                whole.register_post_accumulate_grad_hook(partial(_note, self._used, id(sharded)))

    def end_backward(self, sync: bool) -> None:
        """FSDP2 has reduced gradients, if `sync`: take back those of weights that no rank has used. Collective."""
        self._accumulated |= not sync
        if not self._works or not sync:
            return
        # The same weights in the same order on all ranks.
        given = [p for p in self._without if p.grad is not None]
        used = anywhere([id(p) in self._used for p in given], self._groups, self._device) if given else []
        unused = {p for p, by_any in zip(given, used, strict=True) if not by_any}
        for parameter in unused:
            parameter.grad = None
        self._ran = {u for u in self._ran if u not in self._weights or not unused.issuperset(self._weights[u])}
        self.forget()

    def forget(self) -> None:
        """Forget the gradients of this step."""
        self._used.clear()
        self._without = []
        self._accumulated = False


def _note(used: set[int], key: int, _: Tensor) -> None:
    used.add(key)
