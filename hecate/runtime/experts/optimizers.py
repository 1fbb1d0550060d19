"""Finds the optimizers that train the experts, by torch's public hooks on all optimizer steps.

The same hooks define what a training step is: it ends when such an optimizer has stepped.
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
"""Optimizers that need norms of whole tensors but, for a sharded tensor, compute those of this rank's part only."""


class OptimizerWatch:
    """Keeps track of the optimizers that train the experts, and calls listeners when one has made a step.

    If all experts are frozen, optimizers of any other parameter of the model count too. If an optimizer steps inside a
    backward pass, as soon as gradients are ready, listeners are not called; ask `stepped_in_backward` instead.

    Args:
        model: the sharded model.
        pools: the pools of its experts.
        states: the state of the optimizers.
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
        self._before: list[Callable[[Optimizer], None]] = []
        self._in_backward = False
        self._held: Optimizer | None = None
        self._stepping: set[int] = set()  # ids of optimizers whose step is under way
        self._sharded = any(pool.num_devices > 1 for pool in pools)
        _watch(self)

    def before(self, optimizer: Optimizer) -> None:
        """Called before any optimizer of the process makes a step."""
        _refuse_old_parameters(optimizer, self._replaced)
        if not self.add(optimizer):
            return
        if self._sharded:
            _refuse_whole_tensors(optimizer)
        for listener in self._before:
            listener(optimizer)
        self._stepping.add(id(optimizer))

    def after(self, optimizer: Optimizer) -> None:
        """Called after any optimizer of the process has made a step."""
        self._stepping.discard(id(optimizer))
        if not self.add(optimizer):
            return
        self._held = None
        if in_backward():
            self._in_backward = True
            return
        for listener in self._listeners:
            listener()

    def before_step(self, listener: Callable[[Optimizer], None]) -> None:
        """Call `listener` before each step of an optimizer that trains the experts."""
        self._before.append(listener)

    def on_step(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each step of an optimizer that trains the experts."""
        self._listeners.append(listener)

    def on_load(self, listener: Callable[[], None]) -> None:
        """Call `listener` when an optimizer comes with loaded state; see `OptimizerStates.on_load`."""
        self._states.on_load(listener)

    def close(self) -> None:
        """Stop watching optimizers."""
        _watches.discard(self)

    def hold(self, optimizer: Optimizer) -> None:
        """`add` it, and keep it alive until a step is made: `optimizer` may be a wrapper that the caller drops."""
        self.add(optimizer)
        self._held = optimizer

    @property
    def stepping(self) -> bool:
        """Whether an optimizer's step is under way. If so, the model runs in its closure."""
        return bool(self._stepping)

    def stepped_in_backward(self) -> bool:
        """Whether an optimizer has stepped inside a backward pass since the last call of this method."""
        stepped, self._in_backward = self._in_backward, False
        return stepped

    def add(self, optimizer: Optimizer) -> bool:
        """Register an optimizer if it holds watched parameters; returns whether it does. See `OptimizerStates.meet`."""
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
        """All registered optimizers that are alive."""
        return [optimizer for _, optimizer in self._states.optimizers()]


_watches: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()
"""All watches that are alive.

torch's hooks are global and cannot be removed while a step iterates over them, so one pair of hooks serves all engines.
It keeps no model alive.
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
    """RuntimeError if an optimizer was made before `fully_shard`: the model no longer has its parameters."""
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
