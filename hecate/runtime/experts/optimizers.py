"""The optimizers that train the experts: found by torch's public hooks on every optimizer step, which also define what
a step is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hecate.private_torch import in_backward
from hecate.runtime.experts.optimizer_states import OptimizerStates
from hecate.runtime.experts.pool import ExpertPool

__all__ = ["OptimizerWatch"]

WHOLE_TENSORS = ("torch.optim.Adafactor", "transformers.optimization.Adafactor")
"""Optimizers whose steps depend on norms of whole tensors, and that take those of this rank's part."""


class OptimizerWatch:
    """Knows the optimizers that train the experts, and tells listeners when one has made a step.

    If all experts are frozen, optimizers of any other parameter count. A step inside a backward pass (an optimizer that
    steps as gradients come) ends when that pass does.

    Args:
        model: sharded.
        pools: of its experts.
        states: of the optimizers.
        replaced: parameters that the model had before it was sharded. An optimizer that holds one is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        pools: Sequence[ExpertPool],
        states: OptimizerStates,
        replaced: Sequence[weakref.ref[nn.Parameter]],
    ) -> None:
        self._model = weakref.ref(model)
        self._pools = tuple(pools)
        self._states = states
        self._replaced = {id(p): reference for reference in replaced if (p := reference()) is not None}
        self._listeners: list[Callable[[], None]] = []
        self._in_backward = False
        self._stepping: set[int] = set()  # ids of optimizers whose step is under way
        self._sharded = any(pool.num_devices > 1 for pool in pools)
        _watch(self)

    def before(self, optimizer: Optimizer) -> None:
        """An optimizer, anyone's, is about to make a step."""
        _refuse_old_parameters(optimizer, self._replaced)
        if not self.add(optimizer):
            return
        if self._sharded:
            _refuse_whole_tensors(optimizer)
        self._stepping.add(id(optimizer))

    def after(self, optimizer: Optimizer) -> None:
        """An optimizer, anyone's, has made a step."""
        self._stepping.discard(id(optimizer))
        if not self.add(optimizer):
            return
        if in_backward():
            self._in_backward = True
            return
        for listener in self._listeners:
            listener()

    def on_step(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each step."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Look at no optimizer any more."""
        _watches.discard(self)

    @property
    def stepping(self) -> bool:
        """Whether an optimizer's step is under way, in whose closure the model runs."""
        return bool(self._stepping)

    def stepped_in_backward(self) -> bool:
        """Whether optimizers have stepped inside a backward pass since this was last asked."""
        stepped, self._in_backward = self._in_backward, False
        return stepped

    def add(self, optimizer: Optimizer) -> bool:
        """Take note of an optimizer; whether it trains what is watched. As `OptimizerStates.meet`."""
        watched = self._watched()
        held = any(id(p) in watched for group in optimizer.param_groups for p in group["params"])
        if held:
            self._states.meet(optimizer)
        return held

    def _watched(self) -> set[int]:
        """Ids of the experts' parameters; if all of them are frozen now, of all parameters of the model."""
        experts = {id(p) for pool in self._pools for p in pool.parameters.values()}
        if any(True for pool in self._pools for _ in pool.trainable()):
            return experts
        model = self._model()
        return experts if model is None else {id(p) for p in model.parameters()}

    @property
    def optimizers(self) -> list[Optimizer]:
        """All that are alive."""
        return [optimizer for _, optimizer in self._states.optimizers()]


_watches: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()
"""All that are alive. torch's hooks are global and cannot be taken away while a step iterates over them, so one pair
serves all engines; it keeps no model alive.
"""


def _watch(watch: OptimizerWatch) -> None:
    _hook_once()
    _watches.add(watch)


@cache
def _hook_once() -> None:
    def before(optimizer: Optimizer, args: object, kwargs: object) -> None:
        for watch in list(_watches):
            watch.before(optimizer)

    def after(optimizer: Optimizer, args: object, kwargs: object) -> None:
        for watch in list(_watches):
            watch.after(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _refuse_old_parameters(optimizer: Optimizer, replaced: Mapping[int, weakref.ref[nn.Parameter]]) -> None:
    """RuntimeError if an optimizer was made before `fully_shard`: it would train what the model has no more."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    if any((known := replaced.get(id(p))) is not None and known() is p for p in parameters):
        raise RuntimeError(
            f"{type(optimizer).__name__} was made before hecate.fully_shard and holds parameters that are the model's "
            "no more; make it afterwards, from model.parameters()"
        )


def _refuse_whole_tensors(optimizer: Optimizer) -> None:
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if name in WHOLE_TENSORS:
        raise ValueError(
            f"{name} scales updates by norms of whole tensors, but takes those of one rank's part where a tensor is "
            "sharded; use hecate.examples.adafactor.ShardedAdafactor, which takes those of each expert's matrix"
        )
