"""Inspects model, mesh and config once. Everything built afterwards reads the resulting frozen `Setup`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hecate.adapters.base import find_experts
from hecate.config import FSSDPConfig
from hecate.cost import CostModel
from hecate.experts import Dtypes, ExpertsSpec
from hecate.names import original_modules, original_name
from hecate.policies import Policy, get_policy
from hecate.ranks.agree import agree
from hecate.ranks.same import check_same
from hecate.text import listed
from hecate.values.initialize import initialize, on_meta

__all__ = ["MoELayer", "Setup", "inspect", "resolve_dtypes"]

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
"""Usual names of mesh dimensions along which ranks work on the same tokens or on different layers."""


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of the model.

    Attributes:
        index: index of the layer in the model.
        parent: the module that holds the experts module.
        module: the experts module.
        spec: what an adapter found in it.
        dtypes: dtypes of its experts, resolved from the config.
    """

    index: int
    parent: nn.Module
    module: nn.Module
    spec: ExpertsSpec
    dtypes: Dtypes


@dataclass(frozen=True)
class Setup:
    """What `fully_shard` was given, inspected and resolved.

    Attributes:
        config: as passed.
        mesh: the mesh, as passed or made; None on one device.
        device: device of the experts.
        layers: the MoE layers, in module order.
        cost: the cost model, read from its file if the config names one.
        policy: decides which experts are copied and which change owners.
        without_values: names of parameters and buffers on the meta device.
    """

    config: FSSDPConfig
    mesh: DeviceMesh | None
    device: torch.device
    layers: tuple[MoELayer, ...]
    cost: CostModel
    policy: Policy
    without_values: frozenset[str]

    @property
    def num_devices(self) -> int:
        """Number of devices that share the experts: the size of the mesh's last dimension."""
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    def stacked(self) -> set[int]:
        """`id()` of the parameters whose values go to the pools."""
        return {id(getattr(layer.module, w.kind)) for layer in self.layers for w in layer.spec.weights}


def inspect(model: nn.Module, mesh: DeviceMesh | None, config: FSSDPConfig) -> Setup:
    """Check everything, before anything is changed. Collective.

    Raises:
        ValueError: see `fully_shard`; on all ranks.
    """
    layers, cost = agree(lambda: _inspect(model, mesh, config))
    _check_same([layer.spec for layer in layers], cost, config, mesh)
    mesh = _default_mesh(model) if mesh is None else mesh
    policy = get_policy(config.policy)
    return Setup(config, mesh, _device_of(model, mesh), layers, cost, policy, frozenset(on_meta(model)))


def _inspect(model: nn.Module, mesh: DeviceMesh | None, config: FSSDPConfig) -> tuple[tuple[MoELayer, ...], CostModel]:
    """The checks that a rank can make without the others."""
    _check_mesh(mesh)
    _check_model(model, mesh)
    found = enumerate(find_experts(model))
    layers = tuple(MoELayer(i, f.parent, f.module, f.spec, resolve_dtypes(f.spec, config)) for i, f in found)
    buffers = on_meta(model) - {original_name(key) for key in model.state_dict()}
    if buffers and (missing := buffers - initialize(model, [], config.seed, wanted=buffers)):
        raise ValueError(
            f"fully_shard: buffers {listed(missing)} are on the meta device and not in the state dict; the "
            "model's `_init_weights` must compute them, or build the model with them elsewhere"
        )
    return layers, config.cost_model(_device_of(model, mesh).type)


def _check_model(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """ValueError if the model is sharded already, or is on an accelerator of another type than the mesh."""
    for name, module in original_modules(model).items():
        if hasattr(module, "hecate_spec"):
            raise ValueError(f"fully_shard: {name} is under FSSDP already; call hecate.fully_shard once on a model")
    for key, parameter in model.named_parameters():
        name = original_name(key)
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


def _check_mesh(mesh: DeviceMesh | None) -> None:
    """ValueError if `mesh` does not consist of all ranks of the process group, or has unsupported dimensions."""
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


def _default_mesh(model: nn.Module) -> DeviceMesh | None:
    """A mesh of all ranks in one dimension, on the model's device type; None without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return init_device_mesh(_kind_of(model), (dist.get_world_size(),))


def _kind_of(model: nn.Module) -> str:
    """Device type of the model; if it is on the meta device, the type that it will be allocated on."""
    kind = next(model.parameters()).device.type
    if kind == "meta":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return kind


def _device_of(model: nn.Module, mesh: DeviceMesh | None) -> torch.device:
    """The device that the experts go to: of the mesh's device type, or without a mesh of the model's."""
    kind = mesh.device_type if mesh is not None else _kind_of(model)
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _check_same(specs: Sequence[ExpertsSpec], cost: CostModel, config: FSSDPConfig, mesh: DeviceMesh | None) -> None:
    """ValueError on every rank if ranks differ in anything that plans depend on; names rank, setting, both values."""
    if not dist.is_initialized():
        return
    values = {f"config.{f.name}": repr(getattr(config, f.name)) for f in fields(config)}
    values["cost model"] = repr(cost)
    values["LOCAL_WORLD_SIZE"] = repr(os.environ.get("LOCAL_WORLD_SIZE"))
    values["mesh"] = repr(None if mesh is None else (mesh.device_type, mesh.mesh.tolist()))
    for spec in specs:
        weights = [(w.kind, w.shape, str(w.dtype), w.trainable) for w in spec.weights]
        values[f"model.{spec.name}"] = repr((spec.num_experts, weights))
    check_same("fully_shard", values)


def resolve_dtypes(spec: ExpertsSpec, config: FSSDPConfig) -> Dtypes:
    """Replace None in the config's dtypes by the layer's own; ValueError if the dtypes do not fit together."""
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
