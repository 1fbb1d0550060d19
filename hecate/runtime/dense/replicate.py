"""The dense part replicated: parameters become Replicate() DTensors, but forward and backward use plain tensors.

So all parameters, dense and experts, are DTensors for the optimizer and `clip_grad_norm_`. FSDP2 cannot be used here:
if asked to replicate, it leaves DTensors in the modules during the forward pass, which fails in models that do not
expect them.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from hecate.adapters.transformers import kept_in_float32
from hecate.private_torch import at_end_of_backward, post_accumulate_hooks, refuse_hooks
from hecate.ranks.anywhere import anywhere
from hecate.ranks.messages import all_reduce, broadcast
from hecate.runtime.dense.base import Dense
from hecate.runtime.setup import Setup
from hecate.values.local import local_tensor

__all__ = ["ReplicatedDense"]


@dataclass
class _Replica:
    """One parameter, the places that use it, and the plain leaf that replaces it there during a pass.

    `watched`: whether the leaf has a hook that reports gradients.
    """

    name: str
    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]
    leaf: nn.Parameter
    watched: bool = False


class ReplicatedDense(Dense):
    """Replicates all parameters of `model` except `ignored` on all ranks of the mesh.

    Between `enter` and `leave` the modules hold plain leaf tensors, otherwise DTensors. `reduce` averages the gradients
    of the leaves over all ranks and adds them to those of the DTensors.

    Leaves have `param_dtype` if that is set, except those of parameters that the model's class keeps in float32.

    Args:
        setup: the inspected model and config; it has a mesh, and parameters are replicated along all its dimensions.
        model: changed in place.
        ignored: parameters left alone.
    """

    def __init__(self, setup: Setup, model: nn.Module, ignored: Set[nn.Parameter]) -> None:
        assert setup.mesh is not None
        self._mesh: DeviceMesh = setup.mesh
        self._dtype = setup.config.param_dtype
        self._reduce_dtype = setup.config.reduce_dtype
        self._kept = kept_in_float32(model)
        self._replicas = list(self._build(model, ignored))
        self._inside = False
        self._unreduced = False  # whether leaves got gradients in a backward pass that has not ended
        self.enter()
        self.leave()

    def enter(self) -> None:
        """Put plain leaves with the present values into the modules."""
        for r in self._replicas:
            refuse_hooks(r.name, r.parameter)
            r.leaf.requires_grad_(r.parameter.requires_grad)
            if r.parameter.requires_grad and not r.watched:
                r.watched = True
                r.leaf.register_post_accumulate_grad_hook(lambda leaf: self._arrived())
            if r.leaf.data_ptr() != local_tensor(r.parameter).data_ptr():
                r.leaf.data.copy_(local_tensor(r.parameter))
        self._place(plain=True)

    def leave(self) -> None:
        """Put the DTensors back into the modules."""
        self._place(plain=False)

    def _arrived(self) -> None:
        """Called when a leaf gets a gradient.

        If the engine does not know of the backward pass, because its loss depends on the leaf but not on the model's
        output, the gradients are reduced at the end of that pass.
        """
        if not self._unreduced:
            self._unreduced = True
            at_end_of_backward(self._end_of_backward)

    def _end_of_backward(self) -> None:
        if self._unreduced and not self.awaited:
            self.reduce()

    def reduce(self) -> None:
        """Average the leaves' gradients over all ranks and add them to the parameters' gradients. Collective."""
        self._unreduced = self.awaited = False
        if not self.sync or not any(r.parameter.requires_grad for r in self._replicas):
            return
        trained = [r for r in self._replicas if r.parameter.requires_grad]
        # A parameter that no rank used gets no gradient, so that optimizers leave it alone.
        used = anywhere([r.leaf.grad is not None for r in trained], self._groups, trained[0].leaf.device)
        reduced = [r for r, by_any in zip(trained, used, strict=True) if by_any]
        grads = [self._wire(r.leaf) for r in reduced]
        self._sum(grads)
        for r, grad in zip(reduced, grads, strict=True):
            r.leaf.grad = None
            self._add(r.parameter, (grad / self._mesh.size()).to(r.parameter.dtype))
            for hook in post_accumulate_hooks(r.parameter):
                hook(r.parameter)

    def drop(self) -> None:
        """Drop gradients that the leaves got since the last reduction."""
        self._unreduced = self.awaited = False
        for r in self._replicas:
            r.leaf.grad = None

    def _wire(self, leaf: Tensor) -> Tensor:
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return grad.to(self._reduce_dtype or grad.dtype)

    def _sum(self, tensors: list[Tensor]) -> None:
        for group in self._groups:
            for wait in [all_reduce(tensor, group=group, async_op=True) for tensor in tensors]:
                wait()

    def _add(self, parameter: nn.Parameter, grad: Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = self._replicated(grad)
        else:
            local_tensor(parameter.grad).add_(grad)

    def _build(self, model: nn.Module, ignored: Set[nn.Parameter]) -> Iterator[_Replica]:
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        names = {parameter: name for name, parameter in model.named_parameters()}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter not in ignored:
                    places.setdefault(parameter, []).append((module, name))
        for parameter, where in places.items():
            for group in self._groups:
                broadcast(parameter.data, group)
            as_is = self._dtype is None or parameter in self._kept
            leaf = parameter.data if as_is else parameter.data.to(self._dtype)
            yield _Replica(
                names[parameter],
                nn.Parameter(self._replicated(parameter.data), requires_grad=parameter.requires_grad),
                where,
                nn.Parameter(leaf, requires_grad=parameter.requires_grad),
            )

    @property
    def _groups(self) -> list[dist.ProcessGroup]:
        """One process group per dimension of the mesh."""
        return [self._mesh.get_group(dim) for dim in range(self._mesh.ndim)]

    def _replicated(self, local: Tensor) -> Tensor:
        return DTensor.from_local(local, self._mesh, [Replicate()] * self._mesh.ndim, run_check=False)

    def _place(self, plain: bool) -> None:
        if plain == self._inside:
            return
        self._inside = plain
        for r in self._replicas:
            for module, name in r.places:
                setattr(module, name, r.leaf if plain else r.parameter)
