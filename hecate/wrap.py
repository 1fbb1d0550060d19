"""What `fully_shard` does to a model, part by part: looks, moves experts to pools, plans layers, shards the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as fsdp2

from hecate.adapters.base import FoundExperts, find_experts
from hecate.checkpoint.state import listed
from hecate.config import FSSDPConfig
from hecate.policies import get_policy
from hecate.runtime.build import check_mesh, check_model, device_of, free_slots, resolve_dtypes
from hecate.runtime.chunk import ChunkLayout
from hecate.runtime.copies import Comms, CopiesMemory, PoolLayer, SharedBuffers
from hecate.runtime.initialize import initialize, materialize, on_meta
from hecate.runtime.planner import LayerPlanner, layer_cost
from hecate.runtime.pool import POOL_PREFIX, ExpertPool
from hecate.runtime.replicate import ReplicatedDense

__all__ = ["inspect_model", "make_planners", "make_pools", "move_dense", "shard_dense"]


def inspect_model(model: nn.Module, mesh: DeviceMesh | None, config: FSSDPConfig) -> list[FoundExperts]:
    """What one rank can check by itself; returns the MoE layers. Changes nothing.

    Raises:
        ValueError: as `fully_shard`.
    """
    check_mesh(mesh)
    check_model(model, mesh)
    found = find_experts(model)
    for f in found:
        resolve_dtypes(f.spec, config)
    buffers = on_meta(model) - model.state_dict().keys()
    if buffers and (missing := buffers - initialize(model, [], config.seed, wanted=buffers)):
        raise ValueError(
            f"fully_shard: buffers {listed(missing)} are on the meta device and not in the state dict; the "
            "model's `_init_weights` must compute them, or build the model with them elsewhere"
        )
    config.cost_model(device_of(model, mesh).type)
    return found


def move_dense(
    model: nn.Module, found: Sequence[FoundExperts], device: torch.device, dtype: torch.dtype | None
) -> None:
    """The dense part to `device`, floating-point parameters to `dtype`; pools are made there. Meta tensors stay."""
    experts = _stacked(found)
    for parameter in model.parameters():
        if id(parameter) not in experts:
            to = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
            parameter.data = parameter.data.to(parameter.device if parameter.is_meta else device, to)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer if buffer.is_meta else buffer.to(device))


def make_pools(
    model: nn.Module,
    found: Sequence[FoundExperts],
    config: FSSDPConfig,
    comms: Comms,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> list[ExpertPool]:
    """Pools of the layers as `config.pools` says, filled from the model's own weights and registered on it."""
    pools = []
    for number, layers in enumerate(_by_pool(found, config)):
        pool = ExpertPool(
            [f.spec for f in layers],
            resolve_dtypes(layers[0].spec, config).master,
            device,
            comms.rank,
            comms.topology.num_devices,
            mesh,
        )
        for row, f in enumerate(layers):
            pool.fill(row, f.module)
        for kind, parameter in pool.parameters.items():
            model.register_parameter(f"{POOL_PREFIX}{number}_{kind}", parameter)
        pools.append(pool)
    return pools


def _by_pool(found: Sequence[FoundExperts], config: FSSDPConfig) -> list[list[FoundExperts]]:
    if config.pools == "layer":
        return [[f] for f in found]
    return [[f for f in found if f.spec.weights == weights] for weights in dict.fromkeys(f.spec.weights for f in found)]


def make_planners(
    model: nn.Module,
    found: Sequence[FoundExperts],
    pools: Sequence[ExpertPool],
    config: FSSDPConfig,
    comms: Comms,
    shared: SharedBuffers | None,
    memory: CopiesMemory,
) -> list[LayerPlanner]:
    """One a layer, in order. Collective."""
    device = pools[0].device
    policy = get_policy(config.policy)
    cost_model = config.cost_model(device.type)
    dense_flops = _dense_flops(model, found, pools)
    planners = []
    for index, f in enumerate(found):
        pool = next(p for p in pools if f.spec in p.specs)
        dtypes = resolve_dtypes(f.spec, config)
        slots = _slots(config, comms, ChunkLayout(f.spec.weights).numel * dtypes.param.itemsize, len(found), device)
        storage = PoolLayer(index, pool, pool.specs.index(f.spec), dtypes, comms, slots, shared, memory)
        planners.append(
            LayerPlanner(f.spec, storage, policy, config, layer_cost(cost_model, f.spec, storage, dense_flops))
        )
    return planners


def _slots(config: FSSDPConfig, comms: Comms, chunk_bytes: int, layers: int, device: torch.device) -> int:
    if comms.topology.num_devices == 1 or config.policy == "ep":
        return 0
    return free_slots(config, chunk_bytes, layers, device, comms.topology.devices_per_node)


def _dense_flops(model: nn.Module, found: Sequence[FoundExperts], pools: Sequence[ExpertPool]) -> int:
    """Forward operations a token of the dense part before one MoE layer: 2 a weight, embeddings only look up."""
    apart = {id(p) for pool in pools for p in pool.parameters.values()}
    apart |= _stacked(found)
    apart |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return 2 * sum(p.numel() for p in model.parameters() if id(p) not in apart) // len(found)


def shard_dense(
    model: nn.Module,
    found: Sequence[FoundExperts],
    pools: Sequence[ExpertPool],
    config: FSSDPConfig,
    mesh: DeviceMesh | None,
) -> ReplicatedDense | None:
    """FSDP2 on the blocks and the model, or replicas; None where nothing of ours acts between passes."""
    ignored: set[nn.Parameter] = {p for pool in pools for p in pool.parameters.values()}
    device = pools[0].device
    if mesh is None or config.dense != "fsdp":
        materialize(model, device)
    if mesh is None or config.dense == "none":
        return None
    if config.dense == "replicate":
        return ReplicatedDense(model, mesh, ignored, config.param_dtype, config.reduce_dtype)
    precision = MixedPrecisionPolicy(config.param_dtype, config.reduce_dtype or config.param_dtype)
    for block in [*_blocks(model, found), model]:
        fsdp2(block, mesh=mesh, mp_policy=precision, ignored_params=ignored)
    materialize(model, device)
    return None


def _blocks(model: nn.Module, found: Sequence[FoundExperts]) -> list[nn.Module]:
    """Modules that the model says must not be split, else those that hold an MoE layer; innermost first."""
    named = tuple(getattr(model, "_no_split_modules", None) or ())
    blocks = [m for m in model.modules() if type(m).__name__ in named]
    blocks = blocks or list(dict.fromkeys(f.parent for f in found))
    return [m for m in reversed(blocks) if m is not model]


def _stacked(found: Sequence[FoundExperts]) -> set[int]:
    """Ids of the parameters that go to the pools."""
    return {id(getattr(f.module, w.kind)) for f in found for w in f.spec.weights}
