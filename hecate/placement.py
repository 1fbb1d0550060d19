"""Which devices share a node (`Topology`) and which devices hold which experts (`Placement`). No communication."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Placement", "Topology", "initial_owners"]


@dataclass(frozen=True)
class Topology:
    """Devices are numbered 0..num_devices-1; each node has `devices_per_node` consecutive ones."""

    num_devices: int
    devices_per_node: int

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.devices_per_node < 1:
            raise ValueError(
                f"Topology: num_devices={self.num_devices} and devices_per_node={self.devices_per_node} must be >= 1"
            )
        if self.num_devices % self.devices_per_node:
            raise ValueError(
                f"Topology: num_devices={self.num_devices} must be a multiple of "
                f"devices_per_node={self.devices_per_node}"
            )

    @property
    def num_nodes(self) -> int:
        return self.num_devices // self.devices_per_node

    def node_of(self, device: int) -> int:
        """Index of the node that `device` is in."""
        return device // self.devices_per_node

    @classmethod
    def detect(cls, num_devices: int) -> Topology:
        """The topology of a torchrun launch: LOCAL_WORLD_SIZE devices per node; one node without torchrun.

        If `num_devices` is not a multiple of that (a group of only part of the job), all devices count as one node.
        """
        local = int(os.environ.get("LOCAL_WORLD_SIZE", num_devices))
        return cls(num_devices, local if num_devices % local == 0 else num_devices)


class Placement:
    """Immutable set of (expert, device) pairs (paper, section 3.1).

    Args:
        matrix: bool `[num_experts, num_devices]`; entry (e, d) says that device d holds expert e.
    """

    __slots__ = ("_hash", "_matrix")
    _matrix: NDArray[np.bool_]
    _hash: int

    def __init__(self, matrix: object) -> None:
        array = np.array(matrix, dtype=np.bool_, order="C")
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"Placement: matrix has shape {array.shape}, must be [num_experts >= 1, num_devices >= 1]")
        array.setflags(write=False)
        object.__setattr__(self, "_matrix", array)
        object.__setattr__(self, "_hash", hash((array.shape, array.tobytes())))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Placement is immutable: cannot set {name}")

    def __reduce__(self) -> tuple[type[Placement], tuple[NDArray[np.bool_]]]:
        return Placement, (self._matrix,)

    @classmethod
    def even(cls, num_experts: int, num_devices: int) -> Placement:
        """The initial sharding: consecutive blocks of experts, whose sizes differ by at most one."""
        return cls.from_owners(initial_owners(num_experts, num_devices), num_devices)

    @classmethod
    def from_owners(cls, owners: Sequence[int] | NDArray[np.integer], num_devices: int) -> Placement:
        """A placement with one device per expert.

        Args:
            owners: int `[num_experts]`, the device of each expert, in [0, num_devices).
            num_devices: number of devices.

        Raises:
            ValueError: an expert has no valid owner.
        """
        owner_of = check_owners(owners, num_devices)
        matrix = np.zeros((owner_of.size, num_devices), dtype=np.bool_)
        matrix[np.arange(owner_of.size), owner_of] = True
        return cls(matrix)

    @property
    def matrix(self) -> NDArray[np.bool_]:
        """Read-only bool `[num_experts, num_devices]`."""
        return self._matrix

    @property
    def num_experts(self) -> int:
        return int(self._matrix.shape[0])

    @property
    def num_devices(self) -> int:
        return int(self._matrix.shape[1])

    @property
    def owners(self) -> NDArray[np.int64]:
        """int64 `[num_experts]`: the single device of each expert; ValueError if an expert has none or several."""
        held = self._matrix.sum(axis=1)
        if (held != 1).any():
            expert = int(np.flatnonzero(held != 1)[0])
            raise ValueError(f"Placement.owners: expert {expert} is on {held[expert]} devices, must be on exactly 1")
        return self._matrix.argmax(axis=1).astype(np.int64)

    def held_by(self, device: int) -> NDArray[np.int64]:
        """Ascending expert ids on `device`."""
        return np.flatnonzero(self._matrix[:, device]).astype(np.int64)

    def holders_of(self, expert: int) -> NDArray[np.int64]:
        """Ascending devices that hold `expert`."""
        return np.flatnonzero(self._matrix[expert]).astype(np.int64)

    def __or__(self, other: Placement) -> Placement:
        return Placement(self._matrix | self._like(other, "|"))

    def __sub__(self, other: Placement) -> Placement:
        return Placement(self._matrix & ~self._like(other, "-"))

    def __le__(self, other: Placement) -> bool:
        return bool((self._matrix <= self._like(other, "<=")).all())

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Placement) and np.array_equal(self._matrix, other._matrix))

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        pairs = int(self._matrix.sum())
        return f"Placement(num_experts={self.num_experts}, num_devices={self.num_devices}, pairs={pairs})"

    def _like(self, other: Placement, operator: str) -> NDArray[np.bool_]:
        if self._matrix.shape != other._matrix.shape:
            raise ValueError(
                f"Placement {operator}: shapes {self._matrix.shape} and {other._matrix.shape} differ, "
                "both must be [num_experts, num_devices] of one layer"
            )
        return other._matrix


def check_owners(owners: Sequence[int] | NDArray[np.integer], num_devices: int) -> NDArray[np.int64]:
    """`owners` as int64 `[num_experts]`; ValueError names the first expert without a valid owner."""
    owner_of = np.asarray(owners)
    if owner_of.ndim != 1 or owner_of.size == 0 or not np.issubdtype(owner_of.dtype, np.integer):
        raise ValueError(
            f"owners: shape {owner_of.shape}, dtype {owner_of.dtype}; must be a non-empty integer vector [num_experts]"
        )
    wrong = np.flatnonzero((owner_of < 0) | (owner_of >= num_devices))
    if wrong.size:
        raise ValueError(
            f"owners: expert {wrong[0]} has owner {owner_of[wrong[0]]}, must be a device in [0, {num_devices})"
        )
    return owner_of.astype(np.int64)


def initial_owners(num_experts: int, num_devices: int, before: int = 0) -> NDArray[np.int64]:
    """Even sharding of one layer: consecutive blocks of experts, whose sizes differ by at most one.

    Args:
        num_experts: number of experts of the layer.
        num_devices: number of devices that share them.
        before: number of experts of all layers before this one. If `num_devices` does not divide `num_experts`, larger
            blocks begin at the device after the last one that got a larger block, so that over all layers the devices
            own equally many experts, within one.

    Returns:
        int64 `[num_experts]`, the owner of each expert.
    """
    base, extra = divmod(num_experts, num_devices)
    size = np.full(num_devices, base, dtype=np.int64)
    size[(np.arange(extra) + before) % num_devices] += 1
    return np.repeat(np.arange(num_devices, dtype=np.int64), size)
