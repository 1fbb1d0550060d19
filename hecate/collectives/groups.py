"""The only place where a transport is made: one per process group, device type, topology and links."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch.distributed as dist

from hecate.collectives.on_host import RoutedOnHost
from hecate.collectives.on_stream import RoutedOnStream
from hecate.collectives.queue import HostQueue
from hecate.collectives.route import Links
from hecate.collectives.through_host import ThroughHost
from hecate.collectives.transport import Transport
from hecate.placement import Topology
from hecate.ranks.backend import backend_of

__all__ = ["release", "transport_of"]

logger = logging.getLogger(__name__)

_Key = tuple[str, Topology, Links]


@dataclass
class _GroupTransports:
    """The transports of one process group. Collectives under way at once must not take each other's messages, so all
    of them go through one queue.
    """

    queue: HostQueue = field(default_factory=HostQueue)
    by_key: dict[_Key, Transport] = field(default_factory=dict)


_GROUPS: WeakKeyDictionary[dist.ProcessGroup, _GroupTransports] = WeakKeyDictionary()
"""Lives exactly as long as the group. It is a registry because a process group takes no attributes, and because the
`torch.library` ops get a group by name, so nobody who calls them can hold the transport.
"""


def transport_of(group: dist.ProcessGroup, device_type: str, topology: Topology, links: Links) -> Transport:
    """The transport of a process group; the same object for the same arguments. Not collective.

    The backend that serves `device_type` in the group decides: over gloo the host follows routes, with copies of rows
    in its memory if they are elsewhere; over NCCL a side stream does.

    Args:
        group: process group of the devices.
        device_type: device type of the rows, e.g. "cpu".
        topology: which of the group's ranks share a node.
        links: speeds of the links between the devices; routes are made for them.

    Raises:
        ValueError: a topology of another size, or a backend that cannot carry such rows.
    """
    of_group = _GROUPS.setdefault(group, _GroupTransports())
    key = (device_type, topology, links)
    if key not in of_group.by_key:
        of_group.by_key[key] = _make(group, device_type, topology, links, of_group.queue)
    return of_group.by_key[key]


def release(group: dist.ProcessGroup) -> None:
    """Give back the queue's thread, after what was started has ended; a group that has no transport is left alone.

    To be called before the group is destroyed. Transports of the group that are still held raise RuntimeError;
    `transport_of` makes new ones.
    """
    of_group = _GROUPS.pop(group, None)
    if of_group is not None:
        of_group.queue.close()


def _make(group: dist.ProcessGroup, device_type: str, topology: Topology, links: Links, queue: HostQueue) -> Transport:
    backend = backend_of(group, device_type)
    transport: Transport
    if (backend, device_type) == ("gloo", "cpu"):
        transport = RoutedOnHost(group, topology, links, queue)
    elif (backend, device_type) == ("nccl", "cuda"):
        # Also inside one node: holders of a hot expert hand it on, and its owner does not send all copies or stage all
        # contributions. This has not run on NCCL: rounds are held to the same bits over gloo, and their group calls
        # to NCCL's rules in a simulation (tests/collectives/test_rounds.py).
        transport = RoutedOnStream(group, topology, links)
    elif backend == "gloo":
        transport = ThroughHost(RoutedOnHost(group, topology, links, queue))
    else:
        raise ValueError(
            f"Transport: the process group's backend for {device_type} is {backend}; must be nccl for cuda, or gloo. "
            "Pass backend='cpu:gloo,cuda:nccl' to torch.distributed.init_process_group"
        )
    nodes = f"{topology.num_devices} devices on {topology.num_nodes} nodes"
    logger.debug("%s for %s over %s, %s", type(transport).__name__, device_type, backend, nodes)
    return transport
