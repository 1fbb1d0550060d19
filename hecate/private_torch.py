"""Every private torch call of this package, each with the reason why no public one does.

Nothing else in `hecate` reads a name of torch that begins with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

__all__ = [
    "accumulates",
    "at_end_of_backward",
    "default_store",
    "forget_step",
    "group_named",
    "in_backward",
    "post_accumulate_hooks",
    "refuse_hooks",
    "shard_beside",
    "timeout_of",
]


def group_named(name: str) -> dist.ProcessGroup:
    """The process group whose `group_name` is `name`.

    A `torch.library` op cannot take a process group, so torch's own collectives pass the name; only a private function
    turns it back into the group.
    """
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def timeout_of(group: dist.ProcessGroup, device_type: str) -> timedelta:
    """How long a collective of `group` on that device type waits for its peers.

    A new group gets its backend's default timeout, not that of the group it is a part of, which only its options hold.
    """
    return group._get_backend(torch.device(device_type)).options._timeout


def default_store() -> dist.Store:
    """The store through which the ranks of this job found each other; `init_process_group` returns it to nobody."""
    return distributed_c10d._get_default_store()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the backward pass that is running now has computed all gradients.

    Reductions that run beside backward must end before `backward()` returns, and no public hook runs then. FSDP2 uses
    the same call.
    """
    Variable._execution_engine.queue_callback(callback)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass.

    A forward pass inside a backward pass is a recomputation (activation checkpointing); only the current graph task
    tells. FSDP2 uses the same call.
    """
    return torch._C._current_graph_task_id() != -1


def accumulates(node: Node, name: str) -> bool:
    """Whether the running backward pass accumulates into the leaf whose `AccumulateGrad` is `node`.

    Not so for leaves left out of `backward(inputs=...)`; only the engine knows. In `torch.autograd.grad` of the leaf
    itself the question cannot be answered, and there is nowhere for its gradient to go.

    Args:
        node: of a leaf that the present node leads to.
        name: of the layer, for the error.

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


def post_accumulate_hooks(parameter: Tensor) -> list[Callable[[Tensor], None]]:
    """What `register_post_accumulate_grad_hook` registered, for gradients that autograd does not accumulate itself.

    FSDP2 reads the same attribute.
    """
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def refuse_hooks(name: str, parameter: Tensor) -> None:
    """RuntimeError if `register_hook` was called on a parameter whose gradient autograd does not compute itself."""
    if getattr(parameter, "_backward_hooks", None):
        raise RuntimeError(
            f"{name} has a hook from register_hook, which would never run: gradients of several ranks are summed in "
            "its .grad; use register_post_accumulate_grad_hook"
        )


def shard_beside(module: FSDPModule, parameters: Sequence[nn.Parameter], precision: MixedPrecisionPolicy) -> bool:
    """Let FSDP2 gather and reduce `parameters` whenever it does those of `module`, in a group of their own.

    One group has one dtype. Publicly a module has one group, or one a process group (`shard_placement_fn`), so a module
    with weights of two dtypes would need a second communicator over the same ranks.

    Args:
        module: that `fully_shard` was called on; its own group is not empty.
        parameters: of `module` or below, and in no group yet.
        precision: of the new group.

    Returns:
        False, and nothing is changed, with a torch whose modules have one group only (2.11).
    """
    groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None)
    if groups is None:
        return False
    first = groups[0]
    mesh, after_forward, device = first.mesh_info, first.post_forward_mesh_info, first.device
    made = type(first)(
        list(parameters), first.modules, mesh, after_forward, device, None, precision, first.offload_policy
    )
    groups.append(made)
    return True


def forget_step(model: nn.Module) -> None:
    """Bring FSDP2 back to where it is between passes, without gradients that were not reduced yet.

    `reset_iter_state` is its own way back from a pass that raised, but keeps what `no_sync` has accumulated in
    unsharded gradients. The next reduction would add those to another step's gradients; nothing public reaches them.

    Args:
        model: the root that FSDP2's `fully_shard` was called on; any other module is left alone.
    """
    if not isinstance(model, FSDPModule):
        return
    model.reset_iter_state()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # not before the first pass
                    parameter._unsharded_param.grad = None
