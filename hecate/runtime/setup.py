"""Inspects model, mesh and config once. Everything built afterwards reads the resulting frozen `Setup`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import metadata

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hecate.adapters.base import find_experts
from hecate.adapters.transformers import tie_on_meta
from hecate.config import FSSDPConfig
from hecate.cost import CostModel
from hecate.experts import Dtypes, ExpertsSpec
from hecate.names import original_modules, original_name
from hecate.ops.grouped import not_in_one_call
from hecate.ops.kernels.choice import Work, reason_against, wanted
from hecate.ops.sonicmoe import check_sonicmoe
from hecate.policies import Policy, get_policy
from hecate.private_torch import default_store
from hecate.ranks.agree import agree, gather, rank_and_world
from hecate.ranks.backend import backend_of, device_types
from hecate.ranks.device import own_device, settle_device
from hecate.ranks.same import check_same
from hecate.text import listed
from hecate.values.initialize import initialize, on_meta

__all__ = ["MoELayer", "Setup", "device_of", "inspect", "resolve_dtypes"]

logger = logging.getLogger(__name__)

DEEPSPEED = (0, 19)
"""Oldest DeepSpeed: with it `loss.backward()` reduces gradients as its engine's `backward(loss)` does."""
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
        wrappers: peft's modules around the experts module, which are between it and `parent`.
        dtypes: dtypes of its experts, resolved from the config.
    """

    index: int
    parent: nn.Module
    module: nn.Module
    spec: ExpertsSpec
    wrappers: tuple[nn.Module, ...]
    dtypes: Dtypes


@dataclass(frozen=True)
class Setup:
    """What `fully_shard` was given, inspected and resolved.

    Attributes:
        config: as passed.
        mesh: the mesh, as passed or made; None on one device.
        device: device of the experts.
        sharers: number of processes of the job on that GPU, this one included; 1 on the CPU.
        layers: the MoE layers, in module order.
        cost: the cost model, read from its file if the config names one.
        policy: decides which experts are copied and which change owners.
        kernels: whether Hecate's kernels run, the same on all ranks.
        without_values: names of parameters and buffers on the meta device.
    """

    config: FSSDPConfig
    mesh: DeviceMesh | None
    device: torch.device
    sharers: int
    layers: tuple[MoELayer, ...]
    cost: CostModel
    policy: Policy
    kernels: bool
    without_values: frozenset[str]

    @property
    def num_devices(self) -> int:
        """Number of devices that share the experts: the size of the mesh's last dimension."""
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    def stacked(self) -> set[int]:
        """`id()` of the parameters whose values go to the pools."""
        return {id(m.spec.parameter(m.module, w.kind)) for m in self.layers for w in m.spec.weights}


def inspect(model: nn.Module, mesh: DeviceMesh | None, config: FSSDPConfig) -> Setup:
    """Check everything, before anything is changed. Collective.

    Raises:
        ValueError, RuntimeError: see `fully_shard`; on all ranks.
    """
    _join_launched()
    tie_on_meta(model)
    device, sharers = _settled(model, mesh)  # first: under NCCL even `agree` needs the GPU that is to be this rank's
    layers, cost = agree(lambda: _inspect(model, mesh, config))
    _check_same([layer.spec for layer in layers], cost, config, mesh)
    kernels = _use_kernels(config, device, layers)
    if config.splits == "device":
        _check_splits(config, mesh, device, layers, kernels)
    if mesh is None and _grouped():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    without_values = frozenset(on_meta(model))
    return Setup(config, mesh, device, sharers, layers, cost, get_policy(config.policy), kernels, without_values)


def _use_kernels(config: FSSDPConfig, device: torch.device, layers: Sequence[MoELayer]) -> bool:
    """Whether Hecate's kernels run; if "auto" would have them and some rank cannot, rank 0 logs why. Collective."""
    if not wanted(config.kernels, device):
        return False
    work = [
        Work(layer.spec.name, layer.spec.num_experts, (layer.dtypes.master, layer.dtypes.param)) for layer in layers
    ]
    reasons = gather(agree(lambda: reason_against(config.kernels, device, work)))
    lacking = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if lacking and rank_and_world()[0] == 0:
        rank, reason = lacking[0]
        logger.warning("Hecate's CUDA kernels are not used, PyTorch's operations are: rank %d: %s", rank, reason)
    return not lacking


def _check_splits(
    config: FSSDPConfig, mesh: DeviceMesh | None, device: torch.device, layers: Sequence[MoELayer], kernels: bool
) -> None:
    """Whether a layer can run without the host knowing its counts; the same on all ranks.

    Raises:
        RuntimeError: Hecate's kernels do not run.
        ValueError: a layer or another setting needs the counts.
    """
    what = 'FSSDPConfig.splits="device"'
    if not kernels:
        needed = 'kernels="hecate"' if device.type == "cpu" else "Hecate's kernels, which this job cannot run"
        raise RuntimeError(f'{what} needs {needed}; use splits="host"')
    devices = mesh.size(mesh.ndim - 1) if mesh is not None else dist.get_world_size() if _grouped() else 1
    if devices > 1 and config.rows_per_pair is None:
        raise ValueError(
            f"{what} on {devices} devices needs rows_per_pair, the rows that each sends to each in one layer; at most "
            "tokens of a device times experts per token"
        )
    for layer in layers:
        name, param = layer.spec.name, layer.dtypes.param
        if devices > 1 and get_policy(config.policy).copies and param == layer.dtypes.master:
            raise ValueError(
                f"{what} with policy={config.policy!r}: {name} has its weights in {param} and computes in it, so that "
                "copies are a stack of their own, whose rows the host must find; set param_dtype to another dtype than "
                'master_dtype, policy="ep", or splits="host"'
            )
        stacked = {id(layer.spec.parameter(layer.module, w.kind)) for w in layer.spec.weights}
        if others := [name for name, p in layer.module.named_parameters() if id(p) not in stacked]:
            raise ValueError(
                f"{what}: {name} has parameters that all its experts share, {listed(others)}, whose gradients would be "
                'summed over rows without a meaning; use splits="host"'
            )
        if reason := not_in_one_call(device.type, param, [w.shape for w in layer.spec.weights]):
            raise ValueError(f'{what}: {name} {reason}; use splits="host"')


def _check_kept(config: FSSDPConfig, layers: Sequence[MoELayer]) -> None:
    """ValueError if copies with optimizer state, which have master dtype, would have to be cast to compute."""
    for layer in layers:
        master, param = layer.dtypes.master, layer.dtypes.param
        if any(layer.dtypes.owned(layer.spec, w.kind) != param for w in layer.spec.weights):
            raise ValueError(
                f"FSSDPConfig.policy={config.policy!r}: {layer.spec.name} computes in param_dtype={param}, its master "
                f"weights are {master}; copies that are trained must compute in their own dtype, so set both alike"
            )


def _join_launched() -> None:
    """Initialize the process group in a process that a launcher started, as `init_device_mesh` does.

    Without it each process would train a model of its own.

    Raises:
        ValueError: there are several processes, but how they find each other is not known.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1" or not dist.is_available() or dist.is_initialized():
        return
    if missing := {name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ}:
        raise ValueError(
            f"fully_shard: WORLD_SIZE={world_size}, but no process group is initialized, and {listed(missing)} are not "
            "set to initialize one; call torch.distributed.init_process_group, or unset WORLD_SIZE"
        )
    dist.init_process_group()  # the backends of all device types that are there


def _inspect(model: nn.Module, mesh: DeviceMesh | None, config: FSSDPConfig) -> tuple[tuple[MoELayer, ...], CostModel]:
    """The checks that a rank can make without the others."""
    _check_mesh(mesh)
    if config.dense == "deepspeed":
        _check_deepspeed()
    _check_model(model, mesh)
    layers = tuple(
        MoELayer(i, f.parent, f.module, f.spec, f.wrappers, resolve_dtypes(f.spec, config))
        for i, f in enumerate(find_experts(model))
    )
    if get_policy(config.policy).keeps:
        _check_kept(config, layers)
    if config.expert_gemm == "sonicmoe":
        check_sonicmoe(_kind_of(model, mesh), [(m.spec.name, m.spec.gated, m.dtypes.param) for m in layers])
    named = [*model.state_dict(), *(name for name, _ in model.named_parameters(remove_duplicate=False))]
    buffers = on_meta(model) - {original_name(name) for name in named}
    if buffers and (missing := buffers - initialize(model, [], config.seed, wanted=buffers)):
        raise ValueError(
            f"fully_shard: buffers {listed(missing)} are on the meta device and not in the state dict; the "
            "model's `_init_weights` must compute them, or build the model with them elsewhere"
        )
    return layers, config.cost_model(_kind_of(model, mesh))


def _check_model(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """ValueError if the model is sharded already, or is on an accelerator of another type than the mesh."""
    for name, module in original_modules(model).items():
        if hasattr(module, "hecate_spec"):
            raise ValueError(f"fully_shard: {name} is under FSSDP already; call hecate.fully_shard once on a model")
    kind = _kind_of(model, mesh)
    for key, parameter in model.named_parameters():
        name = original_name(key)
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"fully_shard: parameter {name} is sharded already as {parameter.placements}; "
                "call hecate.fully_shard once, on a model of plain tensors (tensor parallel ones are not supported)"
            )
        if _grouped() and parameter.device.type not in (kind, "cpu", "meta"):
            raise ValueError(
                f"fully_shard: parameter {name} is on {parameter.device.type}, the mesh on {kind}; "
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


def _check_deepspeed() -> None:
    """ValueError if DeepSpeed cannot be used."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        version = ""
    if not version or tuple(map(int, version.split(".")[:2])) < DEEPSPEED:
        least = ".".join(map(str, DEEPSPEED))
        raise ValueError(
            f"FSSDPConfig.dense='deepspeed' needs deepspeed >= {least}, found {version or 'none'}; install "
            "hecate-moe[deepspeed]"
        )
    if not _grouped():
        raise ValueError(
            "FSSDPConfig.dense='deepspeed' needs a process group; call torch.distributed.init_process_group, or "
            "deepspeed.init_distributed, before hecate.fully_shard"
        )


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _kind_of(model: nn.Module, mesh: DeviceMesh | None) -> str:
    """Device type to train on: the mesh's; without a mesh the accelerator if the process group has a backend for it.

    Like FSDP2, this does not depend on where the model was built: it is moved there. Without a process group the model
    stays where it is; if it is on the meta device, it goes to the accelerator if there is one.
    """
    if mesh is not None:
        return mesh.device_type
    own = next(model.parameters(), torch.empty(0)).device.type
    if not _grouped() and own != "meta":
        return own
    world = dist.group.WORLD if _grouped() else None
    served = world is None or "cuda" in device_types(world)
    return "cuda" if served and torch.cuda.is_available() else "cpu"


def device_of(model: nn.Module, mesh: DeviceMesh | None) -> torch.device:
    """The device that `fully_shard(model, mesh)` trains the model on. On CUDA it becomes the current one."""
    own = next(model.parameters(), torch.empty(0)).device
    stays = not _grouped() and own.type != "meta"
    return own if stays else own_device(_kind_of(model, mesh))


def _settled(model: nn.Module, mesh: DeviceMesh | None) -> tuple[torch.device, int]:
    """`device_of`, and how many processes of the job have the same GPU. Collective.

    Raises:
        ValueError: the process group cannot serve the device, or see `settle_device`; on all ranks.
    """
    if not _grouped():
        return device_of(model, mesh), 1
    assert dist.group.WORLD is not None
    kind, rank, world_size = _kind_of(model, mesh), dist.get_rank(), dist.get_world_size()
    device, sharers = settle_device(kind, backend_of(dist.group.WORLD, kind), default_store(), rank, world_size)
    if sharers > 1 and rank == 0:
        logger.warning("%d processes share GPU %s: good for tests, slower than one process", sharers, device)
    return device, sharers


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
    """Replace None in the config's dtypes by the layer's own; ValueError if the dtypes do not fit together.

    Adapters may have another dtype than the weights they adapt: peft makes them float32 if these are bfloat16.
    """
    master = config.master_dtype or _one_dtype(spec, {w.dtype for w in spec.weights if w.kind not in spec.elsewhere})
    adapters = {w.dtype for w in spec.weights if w.kind in spec.elsewhere}
    adapter = config.master_dtype or (_one_dtype(spec, adapters) if adapters else None)
    if torch.float16 in (master, adapter):
        raise ValueError(f"{spec.name}: dtype torch.float16 needs a loss scaler that knows of all ranks; use bfloat16")
    param = config.param_dtype or master
    if config.wire_dtype is not None and config.wire_dtype.itemsize > param.itemsize:
        raise ValueError(
            f"{spec.name}: FSSDPConfig.wire_dtype={config.wire_dtype} is wider than {param}, which the experts compute "
            "in (param_dtype, master_dtype or the model's own); must be at most as wide, or None"
        )
    return Dtypes(master, param, config.reduce_dtype or param, config.wire_dtype, adapter)


def _one_dtype(spec: ExpertsSpec, own: set[torch.dtype]) -> torch.dtype:
    if len(own) > 1:
        raise ValueError(f"{spec.name}: weights have dtypes {own}; must be one, or set FSSDPConfig.master_dtype")
    return next(iter(own))
