"""SparseAllGather and SparseReduceScatter as functions (paper, section 3.1): `torch.library` ops, each the other's
gradient.

Shapes: E experts, D devices (ranks of the group), chunk: the trailing dimensions of one expert, any number of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.groups import transport_of
from hecate.collectives.moves import moves_between
from hecate.collectives.route import Links
from hecate.collectives.summation import accumulation_dtype
from hecate.collectives.transport import Rows, Transport, Work
from hecate.cost import CostModel
from hecate.placement import Placement, Topology
from hecate.private_torch import group_named
from hecate.ranks.same import agree_on, described

__all__ = ["SparseWork", "sparse_all_gather", "sparse_reduce_scatter", "start_gather", "start_reduce"]


class SparseWork:
    """An asynchronous sparse collective; `wait()` returns its result, once."""

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self._wait = wait

    def wait(self) -> Tensor:
        """The result, ready on the current stream and differentiable like the synchronous call's."""
        return self._wait()


def sparse_all_gather(
    shard: Tensor,
    src: Placement,
    dst: Placement,
    group: dist.ProcessGroup | None = None,
    topology: Topology | None = None,
    async_op: bool = False,
) -> Tensor | SparseWork:
    """Bring every expert from its owner to all its holders. Collective; differentiable.

    The ranks first compare what they pass: eight bytes from each rank, for which the host waits.

    Args:
        shard: `[experts owned here under src, *chunk]`, ascending expert id, any dtype.
        src: exactly one device per expert.
        dst: any placement; a device that owns an expert under `src` and holds it here keeps its chunk.
        group: default: the default process group.
        topology: default: torchrun's LOCAL_WORLD_SIZE devices per node.
        async_op: return a `SparseWork`, whose `wait()` returns the result.

    Returns:
        `[experts held here under dst, *chunk]`, ascending expert id.

    Raises:
        ValueError: a placement of another group size, an expert without exactly one owner, a shard of other rows, a
            backend that cannot carry them, or ranks that pass different placements, chunks or dtypes. On all ranks,
            before anything is sent, even if only one rank is wrong.
    """
    return _run(_GATHER, shard, src, dst, group, topology, async_op)


def sparse_reduce_scatter(
    grads: Tensor,
    src: Placement,
    dst: Placement,
    group: dist.ProcessGroup | None = None,
    topology: Topology | None = None,
    async_op: bool = False,
) -> Tensor | SparseWork:
    """Sum every expert's chunks over its holders at its owner. Collective; differentiable.

    The sum runs over the ranks of a node ascending, then the nodes ascending, partial sums in float32 (float64 for
    float64, integers exactly): the same bits every run. The ranks first compare what they pass, as above.

    Args:
        grads: `[experts held here under src, *chunk]`, ascending expert id; a floating-point, complex or integer dtype.
        src: any placement; an expert that nobody holds sums to zero.
        dst: exactly one device per expert.
        group: default: the default process group.
        topology: default: torchrun's LOCAL_WORLD_SIZE devices per node.
        async_op: return a `SparseWork`, whose `wait()` returns the result.

    Returns:
        `[experts owned here under dst, *chunk]`, ascending expert id, the dtype of `grads`.

    Raises:
        ValueError: as for `sparse_all_gather`.
        TypeError: a dtype that has no sum, e.g. bool; on all ranks.
    """
    return _run(_REDUCE, grads, src, dst, group, topology, async_op)


def start_gather(shard: Tensor, src: Placement, dst: Placement, transport: Transport) -> tuple[Tensor, Work]:
    """The result of `sparse_all_gather`, valid after `wait()`. All ranks must pass equal placements and chunks."""
    rank = transport.group.rank()
    shard = shard.detach().contiguous()
    out = shard.new_empty(len(dst.held_by(rank)), *shard.shape[1:])
    sent, received = _by_expert(shard, src, rank), _by_expert(out, dst, rank)
    for expert in sent.keys() & received.keys():
        received[expert].copy_(sent[expert])
    return out, transport.gather(moves_between(src, dst), sent, received)


def start_reduce(grads: Tensor, src: Placement, dst: Placement, transport: Transport) -> tuple[Tensor, Work]:
    """The result of `sparse_reduce_scatter`, valid after `wait()`. All ranks must pass equal placements and chunks."""
    rank = transport.group.rank()
    grads = grads.detach().contiguous()
    out = grads.new_empty(len(dst.held_by(rank)), *grads.shape[1:])
    contributed, sums = _by_expert(grads, src, rank), _by_expert(out, dst, rank)
    return out, transport.reduce(moves_between(dst, src).reversed, contributed, sums, grads.dtype)


def _by_expert(rows: Tensor, placement: Placement, rank: int) -> Rows:
    flat = rows.view(rows.shape[0], math.prod(rows.shape[1:]))
    return dict(zip(placement.held_by(rank).tolist(), flat.unbind(0), strict=True))


def _transport(group: dist.ProcessGroup, topology: Topology, device_type: str) -> Transport:
    cost = CostModel.cpu() if device_type == "cpu" else CostModel()
    return transport_of(group, device_type, topology, Links.of(cost, topology, device_type))


# `torch.library` ops cannot take placements or groups: they get flat lists of `expert * D + device`, and group names.


def _encode(placement: Placement) -> list[int]:
    return np.flatnonzero(placement.matrix).tolist()


def _decode(pairs: Sequence[int], num_experts: int, num_devices: int) -> Placement:
    matrix = np.zeros(num_experts * num_devices, dtype=np.bool_)
    matrix[list(pairs)] = True
    return Placement(matrix.reshape(num_experts, num_devices))


_GATHER, _REDUCE = "sparse_all_gather", "sparse_reduce_scatter"
_START = {_GATHER: start_gather, _REDUCE: start_reduce}


def _run(
    name: str,
    rows: Tensor,
    src: Placement,
    dst: Placement,
    group: dist.ProcessGroup | None,
    topology: Topology | None,
    async_op: bool,
) -> Tensor | SparseWork:
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise RuntimeError(f"{name}: no process group: call torch.distributed.init_process_group first")
    _check(name, rows, src, dst, group, topology)
    topology = Topology.detect(group.size()) if topology is None else topology
    call = (_encode(src), _encode(dst), src.num_experts, topology.devices_per_node, group.group_name)
    if not async_op:
        return getattr(torch.ops.hecate, name)(rows, *call)
    out, work = _START[name](rows, src, dst, _transport(group, topology, rows.device.type))

    def wait() -> Tensor:
        work.wait()
        return _Attach.apply(rows, out, name, call)

    return SparseWork(wait)


@torch.compiler.disable
def _check(
    name: str, rows: Tensor, src: Placement, dst: Placement, group: dist.ProcessGroup, topology: Topology | None
) -> None:
    """Raise the same exception on every rank if any rank passes something wrong or different. Collective.

    What passes here holds for the backward pass too: the gradient has the shape and dtype of the result.
    """

    def values() -> dict[str, object]:
        nodes = Topology.detect(group.size()) if topology is None else topology
        _check_own(name, rows, src, dst, group)
        _transport(group, nodes, rows.device.type)
        return {
            "collective": name,
            "chunk shape": tuple(rows.shape[1:]),
            "dtype": rows.dtype,
            "device type": rows.device.type,
            "src": described(src),
            "dst": described(dst),
            "devices per node": nodes.devices_per_node,
        }

    agree_on(name, values, group)


def _check_own(name: str, rows: Tensor, src: Placement, dst: Placement, group: dist.ProcessGroup) -> None:
    if src.matrix.shape != dst.matrix.shape or src.num_devices != group.size():
        raise ValueError(
            f"{name}: src {src.matrix.shape} and dst {dst.matrix.shape} must both be "
            f"[num_experts, num_devices] with the group's {group.size()} ranks as devices"
        )
    _ = (src if name == _GATHER else dst).owners  # ValueError unless every expert has one owner
    expected = len(src.held_by(group.rank()))
    if rows.ndim < 1 or rows.shape[0] != expected:
        raise ValueError(
            f"{name}: rank {group.rank()} passes rows of shape {tuple(rows.shape)}, "
            f"src gives it {expected} experts; they must be one row per expert"
        )
    if name == _REDUCE:
        accumulation_dtype(rows.dtype)  # TypeError if it has no sum


def _execute(
    name: str, rows: Tensor, src: Sequence[int], dst: Sequence[int], num_experts: int, per_node: int, group: str
) -> Tensor:
    process_group = group_named(group)
    devices = process_group.size()
    placements = (_decode(src, num_experts, devices), _decode(dst, num_experts, devices))
    transport = _transport(process_group, Topology(devices, per_node), rows.device.type)
    out, work = _START[name](rows, *placements, transport)
    work.wait()
    return out


def _fake(
    rows: Tensor, src: Sequence[int], dst: Sequence[int], num_experts: int, devices_per_node: int, group: str
) -> Tensor:
    process_group = group_named(group)
    held = sum(pair % process_group.size() == process_group.rank() for pair in dst)
    return rows.new_empty(held, *rows.shape[1:])


@torch.library.custom_op("hecate::sparse_all_gather", mutates_args=())
def _all_gather(
    rows: Tensor, src: Sequence[int], dst: Sequence[int], num_experts: int, devices_per_node: int, group: str
) -> Tensor:
    return _execute(_GATHER, rows, src, dst, num_experts, devices_per_node, group)


@torch.library.custom_op("hecate::sparse_reduce_scatter", mutates_args=())
def _reduce_scatter(
    rows: Tensor, src: Sequence[int], dst: Sequence[int], num_experts: int, devices_per_node: int, group: str
) -> Tensor:
    return _execute(_REDUCE, rows, src, dst, num_experts, devices_per_node, group)


def _mirror(name: str, grad: Tensor, call: tuple) -> Tensor:
    src, dst, *others = call
    return getattr(torch.ops.hecate, _REDUCE if name == _GATHER else _GATHER)(grad, dst, src, *others)


def _register(op: torch.library.CustomOpDef, name: str) -> None:
    def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch.library's own signature
        ctx.call = tuple(inputs[1:])

    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _mirror(name, grad, ctx.call), None, None, None, None, None

    op.register_fake(_fake)
    op.register_autograd(backward, setup_context=save)


_register(_all_gather, _GATHER)
_register(_reduce_scatter, _REDUCE)


class _Attach(torch.autograd.Function):
    """Gives the result of an asynchronous call the gradient of the synchronous one."""

    @staticmethod
    def forward(ctx, rows: Tensor, out: Tensor, name: str, call: tuple) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.name, ctx.call = name, call
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _mirror(ctx.name, grad, ctx.call), None, None, None
