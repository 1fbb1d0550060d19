"""Makes the dense part as the config asks."""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import nn
from torch.distributed.tensor import DTensor

from hecate.adapters.transformers import cast_constants
from hecate.names import original_name
from hecate.runtime.dense.base import Dense
from hecate.runtime.dense.fsdp import ShardedDense
from hecate.runtime.dense.none import CallersDense
from hecate.runtime.dense.parts import DenseParts
from hecate.runtime.dense.replicate import ReplicatedDense
from hecate.runtime.setup import Setup
from hecate.values.initialize import allocate

__all__ = ["make_dense", "move_dense"]


def move_dense(setup: Setup, model: nn.Module) -> None:
    """Move the dense part to the device, and cast its floating-point parameters to `master_dtype`.

    Meta tensors stay on the meta device.
    """
    stacked, dtype = setup.stacked(), setup.config.master_dtype
    for parameter in model.parameters():
        if id(parameter) not in stacked:
            to = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
            parameter.data = parameter.data.to(parameter.device if parameter.is_meta else setup.device, to)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer if buffer.is_meta else buffer.to(setup.device))


def make_dense(setup: Setup, model: nn.Module, pools: Iterable[nn.Parameter]) -> Dense:
    """Shard or replicate all parameters of `model` except `pools`, and allocate those on the meta device. In place."""
    pools = set(pools)
    if setup.mesh is None or setup.config.dense == "none":
        allocate(model, setup.device)
        return CallersDense()
    if setup.config.param_dtype is not None:
        cast_constants(model, setup.config.param_dtype)
    if setup.config.dense == "deepspeed":
        return _zero(setup, model, pools)
    if setup.config.dense == "replicate":
        allocate(model, setup.device)
        return ReplicatedDense(setup, model, pools)
    sharded = ShardedDense(setup, model, pools)
    allocate(model, setup.device)  # after sharding, so that a device allocates only its own part
    rest = {p for p in model.parameters() if not isinstance(p, DTensor)} - pools
    if not rest:
        return sharded
    return DenseParts(sharded, ReplicatedDense(setup, model, set(model.parameters()) - rest))


def _zero(setup: Setup, model: nn.Module, pools: Set[nn.Parameter]) -> Dense:
    from hecate.runtime.dense.zero import ZeroDense  # needs DeepSpeed, an optional dependency

    allocate(model, setup.device)
    return ZeroDense({original_name(name): p for name, p in model.named_parameters() if p not in pools})
