"""Checks what `fully_shard` was given and makes the parts of an engine from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hecate.collectives.group_seam import timeout_of
from hecate.collectives.p2p import PointToPoint
from hecate.collectives.ranks import gather
from hecate.collectives.route import Links
from hecate.collectives.routed import Routed
from hecate.collectives.transport import Transport
from hecate.config import FSSDPConfig
from hecate.cost import CostModel
from hecate.placement import Topology
from hecate.runtime.chunk import Dtypes, ExpertsSpec
from hecate.runtime.copies import Comms
from hecate.runtime.layer import FSSDPExperts
from hecate.runtime.overlap import ExposedTime, Lane

__all__ = [
    "check_mesh",
    "check_model",
    "check_same",
    "default_mesh",
    "device_of",
    "free_slots",
    "make_comms",
    "resolve_dtypes",
]

OTHER_PARALLELISM = {
    "tp": "tensor",
    "tensor": "tensor",
    "pp": "pipeline",
    "pipe": "pipeline",
    "pipeline": "pipeline",
    "cp": "context",
    "context": "context",
    "sp": "sequence",
    "sequence": "sequence",
}
"""What people call the mesh dimensions along which ranks work on the same tokens or on different layers."""


def device_of(model: nn.Module, mesh: DeviceMesh | None) -> torch.device:
    """Where the experts go: the mesh's device type, else the model's."""
    kind = mesh.device_type if mesh is not None else _kind_of(model)
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def check_model(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """ValueError where a model is sharded already, or lies on an accelerator that is not the mesh's."""
    for name, module in model.named_modules():
        if isinstance(module, FSSDPExperts):
            raise ValueError(f"fully_shard: {name} is under FSSDP already; call hecate.fully_shard once on a model")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"fully_shard: parameter {name} is sharded already as {parameter.placements}; "
                "call hecate.fully_shard once, on a model of plain tensors (tensor parallel ones are not supported)"
            )
        if mesh is not None and parameter.device.type not in (mesh.device_type, "cpu", "meta"):
            raise ValueError(
                f"fully_shard: parameter {name} is on {parameter.device.type}, the mesh on {mesh.device_type}; "
                "the model must be there, on cpu or on meta"
            )


def check_mesh(mesh: DeviceMesh | None) -> None:
    """ValueError where `mesh` is not of the process group."""
    if mesh is None:
        return
    if not dist.is_initialized():
        raise ValueError("fully_shard: a mesh needs a process group; call torch.distributed.init_process_group")
    for name in mesh.mesh_dim_names or ():
        if name in OTHER_PARALLELISM:
            raise ValueError(
                f"fully_shard: mesh has a dimension {name!r}, but {OTHER_PARALLELISM[name]} parallel training is not "
                "supported; the mesh must be (shard,) or (replicate, shard)"
            )
    if mesh.ndim > 2:
        raise ValueError(f"fully_shard: mesh has {mesh.ndim} dimensions; must be (shard,) or (replicate, shard)")
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"fully_shard: the mesh has {mesh.size()} devices, the process group {dist.get_world_size()} ranks; "
            "they must be equal: tensor, pipeline and context parallel training beside it are not supported"
        )


def default_mesh(model: nn.Module) -> DeviceMesh | None:
    """All ranks in one dimension, on the model's device type; None without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return init_device_mesh(_kind_of(model), (dist.get_world_size(),))


def _kind_of(model: nn.Module) -> str:
    """Device type of the model; of one on the meta device, where it will be."""
    kind = next(model.parameters()).device.type
    if kind == "meta":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return kind


def make_comms(
    mesh: DeviceMesh | None,
    device: torch.device,
    guard: Callable[[], AbstractContextManager[None]],
    cost: CostModel,
) -> Comms:
    """Process groups, transport and lanes for the devices that share experts: the last dimension of `mesh`."""
    exposed = ExposedTime()
    lanes = (Lane(device, exposed), Lane(device, exposed))
    if mesh is None:
        return Comms(0, Topology(1, 1), None, None, *lanes, exposed, 1.0, False, guard)
    shard = mesh.get_group(mesh.ndim - 1)
    topology = Topology.detect(shard.size())
    ranks = mesh.mesh.view(-1, shard.size()).tolist()
    tokens, experts = (_new_group(ranks, shard, device) for _ in range(2))
    return Comms(
        rank=shard.rank(),
        topology=topology,
        tokens=tokens,
        experts=_transport(experts, topology, cost, device),
        copies=lanes[0],
        gradients=lanes[1],
        exposed=exposed,
        gradient_scale=1.0 / shard.size(),
        replicated=mesh.size() > shard.size(),
        guard=guard,
    )


def _transport(group: dist.ProcessGroup, topology: Topology, cost: CostModel, device: torch.device) -> Transport:
    # Routes cross each border once; where there is none, plain sends are a single group call. Neither has run on NCCL:
    # rounds are held to the same bits over gloo, and their group calls to NCCL's rules in a simulation
    # (tests/collectives/test_rounds.py).
    if device.type == "cuda" and topology.num_nodes == 1:
        return PointToPoint(group, topology)
    return Routed(group, topology, Links.of(cost, topology, device.type))


def _new_group(ranks: list[list[int]], like: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """A process group of its own for each row of `ranks`, with the timeout of `like`; returns this rank's."""
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout_of(like, device.type))
    # Point-to-point calls between some ranks only are allowed after a first collective of all (NCCL).
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group


def check_same(specs: Sequence[ExpertsSpec], config: FSSDPConfig, mesh: DeviceMesh | None) -> None:
    """ValueError on every rank where ranks disagree on what plans come from; names rank, setting and both values."""
    if not dist.is_initialized():
        return
    values = {f"config.{f.name}": repr(getattr(config, f.name)) for f in fields(config)}
    values["cost model"] = repr([config.cost_model(kind) for kind in ("cpu", "cuda")])
    values["LOCAL_WORLD_SIZE"] = repr(os.environ.get("LOCAL_WORLD_SIZE"))
    values["mesh"] = repr(None if mesh is None else (mesh.device_type, mesh.mesh.tolist()))
    for spec in specs:
        weights = [(w.kind, w.shape, str(w.dtype), w.trainable) for w in spec.weights]
        values[f"model.{spec.name}"] = repr((spec.num_experts, weights))
    everyone = gather(values)
    for rank, other in enumerate(everyone):
        for key in sorted(everyone[0].keys() | other.keys()):
            if other.get(key) != everyone[0].get(key):
                raise ValueError(
                    f"fully_shard: {key} is {everyone[0].get(key)} on rank 0 and {other.get(key)} on rank {rank}; "
                    "all ranks must pass the same"
                )


def resolve_dtypes(spec: ExpertsSpec, config: FSSDPConfig) -> Dtypes:
    """What None means in the config for this layer; ValueError where its dtypes do not go together."""
    own = {w.dtype for w in spec.weights}
    if len(own) > 1 and config.master_dtype is None:
        raise ValueError(f"{spec.name}: weights have dtypes {own}; must be one, or set FSSDPConfig.master_dtype")
    master = config.master_dtype or own.pop()
    if master == torch.float16:
        raise ValueError(f"{spec.name}: dtype torch.float16 needs a loss scaler that knows of all ranks; use bfloat16")
    param = config.param_dtype or master
    if config.wire_dtype is not None and config.wire_dtype.itemsize > param.itemsize:
        raise ValueError(
            f"{spec.name}: FSSDPConfig.wire_dtype={config.wire_dtype} is wider than {param}, which the experts compute "
            "in (param_dtype, master_dtype or the model's own); must be at most as wide, or None"
        )
    return Dtypes(master, param, config.reduce_dtype or param, config.wire_dtype)


def free_slots(config: FSSDPConfig, chunk_bytes: int, layers: int, device: torch.device, per_node: int) -> int:
    """Copies a device has room for: `memory_slots`, or what fits in `memory_share` of the free memory, at most 2.

    The smallest of all ranks, so that they plan the same. Collective where there is a process group.
    """
    if config.memory_slots != "auto":
        return config.memory_slots
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory() // per_node
    alive = min(2, layers) if config.rematerialize else layers
    slots = torch.tensor(min(2, int(free * config.memory_share) // max(1, alive * chunk_bytes)), device=device)
    if dist.is_initialized():
        dist.all_reduce(slots, op=dist.ReduceOp.MIN)
    return int(slots)


def _available_memory() -> int:
    """Bytes that Linux says new allocations may use."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
