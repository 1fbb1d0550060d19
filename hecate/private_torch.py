"""All uses of torch's private API in this package, each with the reason why no public function will do.

No other file of `hecate` uses a name of torch that begins with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable, profiler
from torch.autograd.graph import Node
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

__all__ = [
    "accumulates",
    "allow_data_parallel",
    "at_end_of_backward",
    "base_of",
    "default_store",
    "forget_step",
    "graph_task",
    "group_named",
    "in_backward",
    "map_symmetric",
    "named_range",
    "nccl_options",
    "pass_modes",
    "post_accumulate_hooks",
    "reduce_root_last",
    "refuse_data_parallel",
    "refuse_hooks",
    "shard_beside",
    "symmetric_empty",
    "symmetric_missing",
    "tensors_sharing",
    "timeout_of",
    "unsharded",
]


def group_named(name: str) -> dist.ProcessGroup:
    """The process group whose `group_name` is `name`.

    A `torch.library` op cannot take a process group, so like torch's own collectives it takes the group's name. Only a
    private function finds the group by its name.
    """
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def timeout_of(group: dist.ProcessGroup, device_type: str) -> timedelta:
    """The timeout of collectives of `group` on that device type.

    It is needed because a new group gets the backend's default timeout instead of that of an existing group, and only
    the private options of a group hold its timeout.
    """
    return group._get_backend(torch.device(device_type)).options._timeout


def nccl_options(timeout: timedelta, max_ctas: int) -> object:
    """Options of an NCCL process group whose kernels have a high priority and few thread blocks.

    `timeout` is set here too, because torch warns of options with another timeout than that of the new group, and it
    has no public name.

    Args:
        timeout: of the group's collectives.
        max_ctas: most thread blocks (CTAs), hence SMs, of one collective.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = max_ctas
    options._timeout = timeout
    return options


def default_store() -> dist.Store:
    """The store that the ranks of this job use for rendezvous; `init_process_group` does not return it."""
    return distributed_c10d._get_default_store()


def named_range(name: str) -> AbstractContextManager[object]:
    """A context that profiles show under `name`: `torch.profiler.record_function` while torch's profiler runs.

    Only a private flag says so. Otherwise `record_function` takes 14 us of the host for nothing, eight times per layer;
    the private class takes 0.7 us and is seen by profilers that attach from outside (torch 2.13).
    """
    if profiler._is_profiler_enabled:
        return torch.profiler.record_function(name)
    return torch._C._profiler._RecordFunctionFast(name)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the backward pass that is running now has computed all gradients.

    Reductions that overlap with backward must end before `backward()` returns, and no public hook runs at that time.
    FSDP2 uses the same call.
    """
    Variable._execution_engine.queue_callback(callback)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return graph_task() != -1


def graph_task() -> int:
    """Number of the backward pass that this thread is in; -1 outside of backward passes.

    A forward pass inside a backward pass is a recomputation (activation checkpointing). Only the id of the current
    graph task shows this. FSDP2 uses the same call.
    """
    return torch._C._current_graph_task_id()


def accumulates(node: Node, name: str) -> bool:
    """Whether the running backward pass accumulates into the leaf whose `AccumulateGrad` is `node`.

    It does not for leaves left out of `backward(inputs=...)`; only the autograd engine knows. Inside
    `torch.autograd.grad` with this leaf as an input, the engine cannot answer, and the gradient cannot be returned.

    Args:
        node: the leaf's node; the node that runs now must lead to it.
        name: name of the layer, for the error.

    Raises:
        RuntimeError: inside `torch.autograd.grad`.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: torch.autograd.grad cannot return the gradients of experts, which their owners get; call "
            "backward(), with inputs=... if need be, and read .grad of the parameters"
        ) from error


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor object that `tensor` was made a view of; None if it is no view.

    Only `Tensor._base` leads from a view to the object that it is a view of.
    """
    return tensor._base


def pass_modes() -> tuple[object, ...]:
    """What a forward pass does with given arguments depends on these: gradients, autocast, hooks of saved tensors.

    The hooks show whether code runs inside an activation checkpoint, and in which; nothing public does.
    """
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    casts = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
    return torch.is_grad_enabled(), casts, torch._C._autograd._top_saved_tensors_default_hooks(True)


def post_accumulate_hooks(parameter: Tensor) -> list[Callable[[Tensor], None]]:
    """Hooks registered by `register_post_accumulate_grad_hook`, to call them for gradients not accumulated by autograd.

    FSDP2 reads the same attribute.
    """
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


class _RefusesIteration:
    def __init__(self, message: str) -> None:
        self._message = message

    def __iter__(self) -> Iterator[str]:
        raise TypeError(self._message)


def refuse_data_parallel(model: nn.Module, message: str) -> None:
    """Make `DistributedDataParallel(model)` raise TypeError with `message`, before it changes anything.

    Its constructor first reads which parameters it is to leave alone, from an attribute of the model for which there is
    no public name. Without this, it fails on the mixture of plain tensors and DTensors with an error of `aten.cat`.
    """
    model._ddp_params_and_buffers_to_ignore = _RefusesIteration(message)  # type: ignore[assignment]


def allow_data_parallel(model: nn.Module) -> None:
    """Undo `refuse_data_parallel`."""
    del model._ddp_params_and_buffers_to_ignore


def refuse_hooks(name: str, parameter: Tensor) -> None:
    """RuntimeError if `register_hook` was called on a parameter whose gradient autograd does not compute itself."""
    if getattr(parameter, "_backward_hooks", None):
        raise RuntimeError(
            f"{name} has a hook from register_hook, which would never run: gradients of several ranks are summed in "
            "its .grad; use register_post_accumulate_grad_hook"
        )


def shard_beside(module: FSDPModule, parameters: Sequence[nn.Parameter], precision: MixedPrecisionPolicy) -> bool:
    """Make FSDP2 gather and reduce `parameters` together with those of `module`, but in a separate parameter group.

    All parameters of a group have one dtype. FSDP2's public API gives a module one parameter group, or one per process
    group (`shard_placement_fn`), so weights of two dtypes would need a second communicator over the same ranks.

    Args:
        module: a module that FSDP2's `fully_shard` was called on; its own group is not empty.
        parameters: parameters of `module` or of modules below it that are in no group yet.
        precision: precision of the new group.

    Returns:
        False, and nothing is changed, with a torch whose modules have one group only (2.11).
    """
    groups: list[Any] | None = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None)
    if groups is None:
        return False
    first = groups[0]
    mesh, after_forward, device = first.mesh_info, first.post_forward_mesh_info, first.device
    made = type(first)(
        list(parameters), first.modules, mesh, after_forward, device, None, precision, first.offload_policy
    )
    groups.append(made)
    return True


def tensors_sharing(tensor: Tensor) -> int:
    """How many tensors have the memory of `tensor`, including itself and those that autograd has saved.

    Public weak references notice the end of a Python object only; what autograd saves lives on without one.
    """
    storage = tensor.untyped_storage()  # refers to the memory too
    return torch._C._storage_Use_Count(storage._cdata) - 1


def forget_step(model: nn.Module) -> None:
    """Reset FSDP2 to its state between passes, and drop gradients that were not reduced yet.

    FSDP2's `reset_iter_state` is made for passes that raised, but it keeps unsharded gradients accumulated under
    `no_sync`. The next reduction would add those to another step's gradients, and no public function can drop them.

    Args:
        model: the root that FSDP2's `fully_shard` was called on; for any other module nothing is done.
    """
    if not isinstance(model, FSDPModule):
        return
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
    else:
        _reset_iter_state(model)
    for module in model.modules():
        for group in _parameter_groups(module) if isinstance(module, FSDPModule) else ():
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # set by the first pass
                    parameter._unsharded_param.grad = None


def reduce_root_last(model: FSDPModule) -> None:
    """Make FSDP2 reduce gradients at the end of a backward pass in the order of backward passes: the root's last.

    There it reduces those of units whose inputs needed no gradients. If that is so on some ranks only, as where images
    are projected beside frozen embeddings, the order must be the same as elsewhere. It is that of a private list.

    Args:
        model: the root, once after its first forward pass.
    """
    root: Any = model._get_fsdp_state()
    root._state_ctx.all_states.reverse()


def unsharded(module: FSDPModule) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Pairs of a parameter of one FSDP2 module and the whole tensor that takes its place in a pass.

    Autograd gives gradients to the latter, and FSDP2 takes them away at once. Only hooks on these tensors can tell
    whether a rank used a parameter, and FSDP2 has no public name for them. Empty before the module's first pass.
    """
    parameters = [p for group in _parameter_groups(module) for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
    return [(p.sharded_param, p._unsharded_param) for p in parameters]


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """The groups in which FSDP2 gathers the parameters of one module: since torch 2.12 a list, in 2.11 one or None."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _reset_iter_state(model: nn.Module) -> None:
    """What `FSDPModule.reset_iter_state` does since torch 2.13, for 2.11 and 2.12, which do not have it.

    Without it the first pass after one that raised would take itself for a part of that pass: it would not reduce
    gradients, and would gather weights that are still gathered.
    """
    root: Any = model._get_fsdp_state()  # type: ignore[operator]  # model is an FSDPModule
    root._comm_ctx.post_forward_order.clear()
    root._comm_ctx.all_gather_state = None
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        idle = type(state._training_state).IDLE
        state._training_state = idle
        state._modules_to_run_forward.clear()
        for group in _parameter_groups(module):
            group.finalize_backward()  # waits for all communication of the group
            group._partial_reduce_output = None
            group._training_state = idle
            group.reshard()


def symmetric_missing() -> str | None:
    """What this torch lacks of symmetric memory, in one line; None: nothing.

    Memory that all GPUs of a node map has no public module in torch 2.11 to 2.14, only
    `torch.distributed._symmetric_memory`. Hecate uses three of its functions, which those versions have in common.
    """
    try:
        from torch.distributed import _symmetric_memory as module
    except ImportError as error:
        return f"torch {torch.__version__} has no torch.distributed._symmetric_memory ({error})"
    lacking = [name for name in ("empty", "rendezvous") if not hasattr(module, name)]
    return f"torch {torch.__version__} has no symmetric memory: {', '.join(lacking)} missing" if lacking else None


def symmetric_empty(num_bytes: int, device: torch.device) -> Tensor:
    """Uninitialized uint8 `[num_bytes]` that `map_symmetric` can make visible to other ranks; see `symmetric_missing`.

    Raises:
        RuntimeError: this torch has no such memory.
    """
    if (reason := symmetric_missing()) is not None:
        raise RuntimeError(reason)
    from torch.distributed import _symmetric_memory as module

    return module.empty(num_bytes, dtype=torch.uint8, device=device)


def map_symmetric(own: Tensor, group: dist.ProcessGroup) -> tuple[list[Tensor], object]:
    """Map the memory of all ranks of `group`; see `symmetric_missing`. Collective; the host waits.

    Args:
        own: from `symmetric_empty`, of one size on all ranks.
        group: process group of ranks in one node.

    Returns:
        uint8 `[num_bytes]` of each rank, by rank, and what must live as long as they are used.

    Raises:
        RuntimeError: some rank cannot map another's memory, or two ranks have one GPU.
    """
    from torch.distributed import _symmetric_memory as module

    handle = module.rendezvous(own, group)
    peers = [handle.get_buffer(rank, [own.numel()], torch.uint8) for rank in range(group.size())]
    return [own if rank == group.rank() else peer for rank, peer in enumerate(peers)], (own, handle)
