"""The dense part under torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as fsdp2

from hecate.private_torch import forget_step
from hecate.runtime.dense.base import Dense
from hecate.runtime.setup import Setup

__all__ = ["ShardedDense"]


class ShardedDense(Dense):
    """FSDP2 on the model's blocks and on the model, with its own hooks for passes and reductions.

    Args:
        setup: of the model, on a mesh.
        model: changed in place.
        ignored: parameters left alone.
    """

    def __init__(self, setup: Setup, model: nn.Module, ignored: Iterable[nn.Parameter]) -> None:
        config = setup.config
        precision = MixedPrecisionPolicy(config.param_dtype, config.reduce_dtype or config.param_dtype)
        for block in [*_blocks(setup, model), model]:
            fsdp2(block, mesh=setup.mesh, mp_policy=precision, ignored_params=set(ignored))
        assert isinstance(model, FSDPModule)
        self._model = model

    def set_sync(self, sync: bool) -> None:
        """As FSDP2's `set_requires_gradient_sync`."""
        super().set_sync(sync)
        self._model.set_requires_gradient_sync(sync)

    def enter(self) -> None:
        """FSDP2's hooks do it."""

    def leave(self) -> None:
        """FSDP2's hooks do it."""

    def leave_evaluation(self) -> None:
        """FSDP2 keeps the root's parameters whole for a backward pass: optimizers and users would find those."""
        self._model.reshard()

    def reduce(self) -> None:
        """FSDP2 has reduced them during the backward pass."""

    def drop(self) -> None:
        """Also bring FSDP2 back from a pass that raised."""
        forget_step(self._model)


def _blocks(setup: Setup, model: nn.Module) -> list[nn.Module]:
    """Modules that the model says must not be split, else those that hold an MoE layer; innermost first."""
    named = tuple(getattr(model, "_no_split_modules", None) or ())
    blocks = [m for m in model.modules() if type(m).__name__ in named]
    blocks = blocks or list(dict.fromkeys(layer.parent for layer in setup.layers))
    return [m for m in reversed(blocks) if m is not model]
