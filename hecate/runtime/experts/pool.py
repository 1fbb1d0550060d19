"""Expert pools: a device's owned experts of several MoE layers, in one parameter per kind (docs/design.md, decision 1).

A slot is one row of a pool on one device. Slots are sorted by (layer, expert), so the owned experts of a layer are
consecutive rows. Changing owners permutes slots and changes no shape. Rows beyond the owned experts are zero padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hecate.config import FSSDPConfig
from hecate.experts import POOL_PREFIX, Dtypes, ExpertsSpec, OwnedExperts, WeightSpec
from hecate.placement import Placement, check_owners, initial_owners
from hecate.runtime.setup import MoELayer, Setup
from hecate.values.initialize import Stack
from hecate.values.local import local_tensor

__all__ = ["POOL_PREFIX", "ExpertPool", "make_pools"]


class ExpertPool:
    """Owned experts of layers whose experts have weights of equal kinds, shapes and dtypes.

    Attributes:
        specs: specs of the layers.
        owners: per layer, int64 `[num_experts]`; see `set_owners`.
        slots: rows of this device, the same on every device.
        parameters: kind -> the registered parameter, `[slots * devices, *shape]` as DTensor, `[slots, *shape]` without
            a mesh.
        unreduced: kind -> `[slots, *shape]`, gradients of this replica that were not averaged over replicas yet,
            because their passes ran inside `no_sync`.
    """

    def __init__(
        self,
        specs: Sequence[ExpertsSpec],
        dtypes: Dtypes,
        device: torch.device,
        rank: int,
        num_devices: int,
        mesh: DeviceMesh | None,
    ) -> None:
        self.specs = tuple(specs)
        self.rank = rank
        self.num_devices = num_devices
        self.mesh = mesh
        self.device = device
        self.unreduced: dict[str, Tensor] = {}
        self.set_owners(self.initial_owners())
        self.slots = -(-sum(s.num_experts for s in self.specs) // num_devices)
        self.parameters = {
            w.kind: nn.Parameter(
                self.distribute(self._zeros(w, dtypes.owned(self.specs[0], w.kind))), requires_grad=w.trainable
            )
            for w in self.weights
        }

    def _zeros(self, weight: WeightSpec, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.slots, *weight.shape, dtype=dtype, device=self.device)

    @property
    def weights(self) -> tuple[WeightSpec, ...]:
        return self.specs[0].weights

    def initial_owners(self) -> list[NDArray[np.int64]]:
        """Per layer, the even sharding that training starts from.

        Over all layers, devices own equally many experts, within one.
        """
        before = accumulate((s.num_experts for s in self.specs), initial=0)
        return [initial_owners(s.num_experts, self.num_devices, n) for s, n in zip(self.specs, before, strict=False)]

    def fits(self, owners: Sequence[NDArray[np.int64]]) -> bool:
        """Whether with these owners no device has more experts than slots."""
        return int(np.bincount(np.concatenate(owners), minlength=self.num_devices).max()) <= self.slots

    def set_owners(self, owners: Sequence[NDArray[np.integer]]) -> None:
        """Set new owners; the caller moves the rows.

        Args:
            owners: per layer, `[num_experts]`.
        """
        self.owners = tuple(check_owners(o, self.num_devices) for o in owners)
        self._placements = [Placement.from_owners(o, self.num_devices) for o in self.owners]
        self._owned = [p.held_by(self.rank) for p in self._placements]
        ends = np.cumsum([0, *map(len, self._owned)]).tolist()
        self._rows = [slice(*pair) for pair in pairwise(ends)]

    # In the methods below, `place` is the position of a layer among the pool's layers.

    def placement(self, place: int) -> Placement:
        """The owner of each expert of a layer, as a placement."""
        return self._placements[place]

    def owned(self, place: int) -> NDArray[np.int64]:
        """Ascending ids of a layer's experts on this device."""
        return self._owned[place]

    def rows(self, place: int) -> slice:
        """The slots of a layer's owned experts, in ascending expert id."""
        return self._rows[place]

    def weights_of(self, place: int) -> dict[str, Tensor]:
        """Views kind -> `[owned, *shape]` of a layer's owned experts, outside autograd."""
        rows = self.rows(place)
        return {kind: local_tensor(p)[rows] for kind, p in self.parameters.items()}

    def flat_rows(self) -> NDArray[np.int64]:
        """Int64 `[slots]`: the expert in each slot of this device, counted over the pool's layers; -1 for padding."""
        first = np.cumsum([0, *(s.num_experts for s in self.specs)])
        owned = np.concatenate([start + ids for start, ids in zip(first, self._owned, strict=False)])
        return np.concatenate([owned, np.full(self.slots - len(owned), -1, dtype=np.int64)])

    def entries(self, kind: str | None = None) -> list[OwnedExperts]:
        """The stacked weights that this pool holds, by their names in the model.

        Args:
            kind: only weights of this kind; None: of all kinds.
        """
        kinds = self.parameters if kind is None else (kind,)
        return [
            OwnedExperts(spec.name_of(k), self.parameters[k], self._placements[i], self._owned[i], self._rows[i])
            for k in kinds
            for i, spec in enumerate(self.specs)
        ]

    def stacks(self) -> list[Stack]:
        """The owned experts of each layer in the form that `initialize` takes."""
        return [
            Stack(spec.name, self.weights_of(i), owned.tolist(), {kind: e.name for kind, e in spec.elsewhere.items()})
            for i, (spec, owned) in enumerate(zip(self.specs, self._owned, strict=True))
        ]

    def add_gradients(
        self, first: int, grads: Mapping[str, Tensor], scale: float, target: Mapping[str, Tensor], fresh: bool = False
    ) -> None:
        """Add gradients to those of consecutive owned experts of a layer.

        Args:
            first: position of the first of these experts among the layer's owned experts.
            grads: kind -> one stack of gradients `[n, *shape]`.
            scale: factor of the gradients.
            target: kind -> `[owned, *shape]`, where to add them; see `gradients_of`.
            fresh: whether these rows of `target` have no values yet.
        """
        for kind, rows in grads.items():
            if kind not in target or not self.parameters[kind].requires_grad:  # frozen since the forward pass
                continue
            into = target[kind][first : first + len(rows)]
            if not fresh:
                into.add_(rows, alpha=scale)
            elif rows.dtype == into.dtype:
                torch.mul(rows, scale, out=into)
            else:  # unlike a number, a tensor of one element has a say in the dtype that is computed in
                torch.mul(rows, into.new_full((1,), scale), out=into)

    def take_gradients(self, grads: Mapping[str, Tensor], scale: float) -> bool:
        """Make `grads` the gradients of all slots, which saves filling memory with zeros and adding to it.

        Args:
            grads: kind -> gradients `[n, *shape]`, not yet scaled; not to be changed by anybody afterwards.
            scale: factor of the gradients.

        Returns:
            Whether they were taken. They are not if there are gradients already, if they are not those of all slots, or
            if they share memory.
        """
        for kind, rows in grads.items():
            parameter = self.parameters[kind]
            whole = rows.shape[0] == self.slots and rows.is_contiguous() and rows.dtype == parameter.dtype
            if not whole or parameter.grad is not None or not parameter.requires_grad:
                return False
        if len({rows.untyped_storage().data_ptr() for rows in grads.values()}) < len(grads):
            return False
        self.adopt({kind: rows if scale == 1 else rows * scale for kind, rows in grads.items()})
        return True

    def gradients_of(self, place: int, kinds: Iterable[str]) -> dict[str, Tensor]:
        """Views kind -> `[owned, *shape]` of the gradients of a layer's owned experts, without frozen kinds.

        Gradients that are not there yet are made of zeros, also on a device without experts: optimizers and norms
        communicate per parameter, so all ranks must have gradients of the same parameters.
        """
        rows = self.rows(place)
        return {kind: self.gradient(kind)[rows] for kind in kinds if self.parameters[kind].requires_grad}

    def new_gradients(self, kinds: Iterable[str]) -> dict[str, Tensor] | None:
        """Memory for the gradients of the pool's only layer, to be filled and then given to `adopt`.

        That saves filling memory with zeros and adding to it. Until they are adopted nobody sees them, so a backward
        pass that fails leaves no gradients without values.

        Returns:
            Kind -> `[slots, *shape]`, of which the rows of owned experts have no values; without frozen kinds. None if
            there are gradients already, or several layers.
        """
        wanted = {kind: self.parameters[kind] for kind in kinds if self.parameters[kind].requires_grad}
        if len(self.specs) > 1 or any(p.grad is not None for p in wanted.values()):
            return None
        made = {kind: torch.empty_like(local_tensor(p)) for kind, p in wanted.items()}
        for rows in made.values():
            self.clear_padding(rows)
        return made

    def adopt(self, made: Mapping[str, Tensor]) -> None:
        """Make rows `[slots, *shape]` the parameters' gradients, but not those of kinds that are frozen by now."""
        for kind, rows in made.items():
            if self.parameters[kind].requires_grad:
                self.parameters[kind].grad = self.distribute(rows)

    def gradient(self, kind: str) -> Tensor:
        """Gradient rows `[slots, *shape]` of this device; made of zeros if there is no gradient yet."""
        parameter = self.parameters[kind]
        if parameter.grad is None:
            parameter.grad = self.distribute(torch.zeros_like(local_tensor(parameter)))
        return local_tensor(parameter.grad)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(kind, parameter) of the kinds that get gradients now; users may freeze and unfreeze them."""
        return ((kind, p) for kind, p in self.parameters.items() if p.requires_grad)

    def unreduced_rows(self, kind: str) -> Tensor:
        """Rows `[slots, *shape]` of `unreduced`; made of zeros if there are none yet."""
        if kind not in self.unreduced:
            self.unreduced[kind] = torch.zeros_like(local_tensor(self.parameters[kind]))
        return self.unreduced[kind]

    def fill(self, place: int, experts: nn.Module) -> None:
        """Copy this device's owned experts of a layer from the parameters of `experts`; skip those on meta."""
        owned = torch.from_numpy(self.owned(place))
        for kind, rows in self.weights_of(place).items():
            stacked = self.specs[place].stack(experts, kind)
            if not stacked.is_meta:
                rows.copy_(stacked[owned.to(stacked.device)])

    def clear_padding(self, tensor: Tensor) -> None:
        """Zero the rows `[slots, ...]` of this device that hold no expert."""
        local_tensor(tensor)[self._rows[-1].stop :] = 0

    def distribute(self, local: Tensor) -> Tensor:
        """The DTensor of which `local` `[slots, ...]` is this device's part; `local` itself without a mesh."""
        if self.mesh is None:
            return local
        placements = [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]
        return DTensor.from_local(local, self.mesh, placements, run_check=False)


def make_pools(setup: Setup, model: nn.Module, rank: int) -> list[ExpertPool]:
    """Make the pools according to `config.pools`, fill them from the model's weights and register them on the model.

    Args:
        setup: the inspected model and config.
        model: gets the pools' parameters.
        rank: this device's rank among those that share the experts.
    """
    pools = []
    for number, layers in enumerate(_by_pool(setup.layers, setup.config)):
        specs, dtypes = [layer.spec for layer in layers], layers[0].dtypes
        pool = ExpertPool(specs, dtypes, setup.device, rank, setup.num_devices, setup.mesh)
        for place, layer in enumerate(layers):
            pool.fill(place, layer.module)
        for kind, parameter in pool.parameters.items():
            model.register_parameter(f"{POOL_PREFIX}{number}_{kind}", parameter)
        pools.append(pool)
    return pools


def _by_pool(layers: Sequence[MoELayer], config: FSSDPConfig) -> list[list[MoELayer]]:
    if config.pools == "layer":
        return [[layer] for layer in layers]
    kinds = dict.fromkeys(layer.spec.weights for layer in layers)
    return [[layer for layer in layers if layer.spec.weights == weights] for weights in kinds]
