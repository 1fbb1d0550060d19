"""The optimizers that train the experts: found by torch's public hooks on every optimizer step, which also define what
a step is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

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
    steps as gradients come) ends when that pass does. Before a step of `WHOLE_TENSORS` it raises ValueError.
    """

    def __init__(self, model: nn.Module, pools: Sequence[ExpertPool], states: OptimizerStates) -> None:
        self._model = weakref.ref(model)
        self._pools = tuple(pools)
        self._states = states
        self._listeners: list[Callable[[], None]] = []
        self._in_backward = False
        self._latest: dict[int, weakref.ref[Optimizer]] = {}  # by parameter id
        self._sharded = any(pool.num_devices > 1 for pool in pools)
        _watch(self)

    def before(self, optimizer: Optimizer) -> None:
        """An optimizer, anyone's, is about to make a step."""
        if self.add(optimizer) and self._sharded:
            _refuse_whole_tensors(optimizer)

    def after(self, optimizer: Optimizer) -> None:
        """An optimizer, anyone's, has made a step."""
        self._states.mark(optimizer)
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

    def stepped_in_backward(self) -> bool:
        """Whether optimizers have stepped inside a backward pass since this was last asked."""
        stepped, self._in_backward = self._in_backward, False
        return stepped

    def add(self, optimizer: Optimizer) -> bool:
        """Take note of an optimizer; whether it trains what is watched. As `OptimizerStates.meet`."""
        watched = self._watched()
        held = [id(p) for group in optimizer.param_groups for p in group["params"] if id(p) in watched]
        self._latest.update(dict.fromkeys(held, weakref.ref(optimizer)))
        if held:
            self._states.meet(optimizer)
        return bool(held)

    def _watched(self) -> set[int]:
        """Ids of the experts' parameters; if all of them are frozen now, of all parameters of the model."""
        experts = {id(p) for pool in self._pools for p in pool.parameters.values()}
        if any(True for pool in self._pools for _ in pool.trainable()):
            return experts
        model = self._model()
        return experts if model is None else {id(p) for p in model.parameters()}

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer state of a watched parameter: of the optimizer that stepped it last; empty before."""
        reference = self._latest.get(id(parameter))
        optimizer = None if reference is None else reference()
        return {} if optimizer is None else optimizer.state.get(parameter, {})

    @property
    def optimizers(self) -> list[Optimizer]:
        """All that are alive."""
        alive = {id(o): o for o in (reference() for reference in self._latest.values()) if o is not None}
        return list(alive.values())


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


def _refuse_whole_tensors(optimizer: Optimizer) -> None:
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if name in WHOLE_TENSORS:
        raise ValueError(
            f"{name} scales updates by norms of whole tensors, but takes those of one rank's part where a tensor is "
            "sharded; use hecate.examples.adafactor.ShardedAdafactor, which takes those of each expert's matrix"
        )
