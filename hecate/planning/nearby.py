"""Copies planned ahead across nodes: some keep tokens in the node they come from, the others balance the devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hecate.cost import LayerCost
from hecate.loads.predict import guesses, predict_by_device
from hecate.placement import Placement, Topology
from hecate.planning.limits import CopyLimits
from hecate.planning.materialize import copies_for
from hecate.planning.plan import copies_on, with_copies
from hecate.planning.quota import min_max_loads
from hecate.planning.times import layer_ns

__all__ = ["NodeCopies", "nearby_copies"]

Int64 = NDArray[np.int64]

HALF, ALL, NONE = 2, 4, 0
"""Quarters of the slots for copies that keep tokens in their node."""


def nearby_copies(
    counts: Int64, owners: Int64, topology: Topology, per_node: int, *, free: int, price: int
) -> Placement:
    """Owners, and in each node one copy of the `per_node` foreign experts to which it sends most tokens.

    Args:
        counts: int64 `[num_devices, num_experts]`, tokens by the device they come from.
        owners: int64 `[num_experts]`, the device that owns each expert.
        topology: which devices share a node.
        per_node: copies in each node, at most; they are spread evenly over its devices.
        free: copies that may enter a node at no price, because other work hides them.
        price: tokens that every further copy must keep in its node.

    The hottest comes first, to the device that would compute the fewest of the node's own tokens. Experts that get no
    tokens from the node are not copied.
    """
    copies: list[tuple[int, int]] = []
    sent = counts.reshape(topology.num_nodes, topology.devices_per_node, -1).sum(axis=1)
    for node, tokens in enumerate(sent):
        copies += _into_node(node, tokens, owners, topology.devices_per_node, per_node, free, price)
    return with_copies(Placement.from_owners(owners, topology.num_devices), copies)


def _into_node(
    node: int, tokens: Int64, owners: Int64, devices: int, copies: int, free: int, price: int
) -> list[tuple[int, int]]:
    at_home = owners // devices == node
    load = np.bincount(owners[at_home] % devices, tokens[at_home], devices).astype(np.int64).tolist()
    foreign = np.flatnonzero(~at_home & (tokens > 0))
    hottest = foreign[np.argsort(-tokens[foreign], kind="stable")]
    paying = max(free, int((tokens[hottest] >= price).sum()))
    hottest = hottest[: min(copies, paying)]
    room = [(copies + after) // devices for after in reversed(range(devices))]
    found = []
    for expert, kept in zip(hottest.tolist(), tokens[hottest].tolist(), strict=True):
        device = min((d for d in range(devices) if room[d]), key=load.__getitem__)
        room[device] -= 1
        load[device] += kept
        found.append((expert, node * devices + device))
    return found


@dataclass(frozen=True, eq=False)
class NodeCopies:
    """Finds copies for a layer on several nodes; see `best`.

    Attributes:
        history: int64 `[steps >= 1, num_devices, num_experts]`, oldest first.
        owners: int64 `[num_experts]`, the device that owns each expert.
        topology: which devices share a node.
        cost: of the layer.
        slots: copies per device.
        entries: experts that may enter each node.
        target: tokens that the busiest device should have at most.
    """

    history: Int64
    owners: Int64
    topology: Topology
    cost: LayerCost
    slots: int
    entries: int
    target: int

    def best(self) -> Placement:
        """The placement after which the layer is expected to take least time.

        Half of the slots keep tokens in their node, the rest make the balance robust. If that does not balance the
        devices, all slots for balance are the alternative; if it does, but border traffic prevails, all for tokens.
        """
        placement, ns, largest = self._timed(HALF)
        if largest > self.target:
            other, other_ns, _ = self._timed(NONE)
        elif 2 * self.cost.token_ns(largest) < ns:
            other, other_ns, _ = self._timed(ALL)
        else:
            return placement
        return other if other_ns < ns else placement

    def _timed(self, quarters: int) -> tuple[Placement, int, int]:
        """Copies with this share of the slots for tokens, the layer's nanoseconds, and tokens of the busiest device.

        The latter is a mean over guesses, so that a placement that suits only the likeliest loads does not win.
        """
        topology, counts = self.topology, self._counts
        near = self.slots * topology.devices_per_node * quarters // 4
        start = nearby_copies(counts, self.owners, topology, near, free=self.entries, price=self.cost.copy_tokens)
        limits = CopyLimits.of(topology, self.slots - copies_on(start, self.owners), max(0, self.entries - near))
        placement = copies_for(self._levels, self.owners, topology, limits, start)
        largest = int(min_max_loads(self._levels[0], placement).mean())  # of the least pessimistic guesses
        return placement, layer_ns(self.cost, counts, placement, topology, largest), largest

    @cached_property
    def _counts(self) -> Int64:
        return predict_by_device(self.history)

    @cached_property
    def _levels(self) -> Int64:
        """Guesses of the next loads, int64 `[levels, guesses, num_experts]`."""
        return guesses(self.history)
