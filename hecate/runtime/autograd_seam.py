"""The private torch.autograd calls of this package, and why there is no public way.

- Reductions that run behind backward must end before `backward()` returns: only `queue_callback` runs code then.
- A forward pass inside a backward pass is a recomputation (activation checkpointing): only the current graph task says
  so. FSDP2 uses the same two calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import Node

__all__ = ["accumulates", "at_end_of_backward", "in_backward", "post_accumulate_hooks", "refuse_hooks"]


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the backward pass that is running now has computed all gradients."""
    Variable._execution_engine.queue_callback(callback)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
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
