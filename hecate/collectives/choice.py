"""Which transport carries copies and gradients: memory that all ranks share, or the backend's messages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from hecate.collectives.route import Links
from hecate.collectives.summation import accumulation_dtype
from hecate.collectives.symmetric import ADDED, Symmetric
from hecate.config import TransportChoice
from hecate.ops.kernels.cuda import missing
from hecate.placement import Topology
from hecate.private_torch import symmetric_missing, timeout_of
from hecate.ranks.agree import gather, rank_and_world

__all__ = ["symmetric_transports", "wanted"]

logger = logging.getLogger(__name__)


def wanted(choice: TransportChoice, device: torch.device) -> bool:
    """Whether `choice` means shared memory on `device`: "auto" does on CUDA; on the CPU it is there for tests."""
    return choice == "symmetric" or (choice == "auto" and device.type == "cuda")


def symmetric_transports(
    choice: TransportChoice,
    groups: Sequence[dist.ProcessGroup],
    topology: Topology,
    links: Links,
    device: torch.device,
    wires: Iterable[torch.dtype],
) -> list[Symmetric] | None:
    """A transport over shared memory for each group; None if some rank cannot, for which rank 0 logs the reason.

    Collective over all ranks of the job.

    Args:
        choice: what the user asked for; something that is `wanted`.
        groups: of the same ranks.
        topology: which of these ranks share a node.
        links: between their devices.
        device: of this rank.
        wires: dtypes in which gradients are sent.

    Raises:
        RuntimeError: some rank cannot, and the user asked for it by name; on all ranks.
    """
    reason, made = _static_reason(topology, device, wires), list[Symmetric]()
    if (reason := _first(reason)) is None:
        try:
            made = [Symmetric(group, topology, links, device, timeout_of(group, device.type)) for group in groups]
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = _first(reason)
    if reason is None:
        return made
    for transport in made:
        transport.close()
    if choice == "symmetric":
        raise RuntimeError(
            f'transport="symmetric": {reason}; use transport="auto" or transport="messages" to send rows instead'
        )
    if rank_and_world()[0] == 0:
        logger.warning("copies and gradients of experts are sent as messages, not read from shared memory: %s", reason)
    return None


def _first(reason: str | None) -> str | None:
    """The reason of the lowest rank that has one. Collective."""
    return next((f"rank {r}: {each}" for r, each in enumerate(gather(reason)) if each is not None), None)


def _static_reason(topology: Topology, device: torch.device, wires: Iterable[torch.dtype]) -> str | None:
    """Why shared memory cannot be used, as far as a rank knows by itself; None: nothing speaks against it."""
    checks: tuple[Callable[[], str | None], ...] = (
        lambda: _nodes(topology),
        lambda: _sums(wires),
        lambda: missing(device),
        lambda: symmetric_missing() if device.type == "cuda" else None,
        lambda: _peers(topology, device),
    )
    return next((reason for check in checks if (reason := check()) is not None), None)


def _nodes(topology: Topology) -> str | None:
    if topology.num_nodes == 1:
        return None
    return f"the ranks that share experts are on {topology.num_nodes} nodes, and it is inside one"


def _sums(wires: Iterable[torch.dtype]) -> str | None:
    lacking = [wire for wire in wires if wire not in ADDED]
    return f"no kernel adds gradients in {lacking[0]} to sums in {accumulation_dtype(lacking[0])}" if lacking else None


def _peers(topology: Topology, device: torch.device) -> str | None:
    """Only where this process sees the GPUs of its node; elsewhere mapping their memory tells."""
    if device.type != "cuda" or torch.cuda.device_count() < topology.devices_per_node:
        return None
    own = torch.cuda.current_device() if device.index is None else device.index
    others = (i for i in range(topology.devices_per_node) if i != own)
    away = [i for i in others if not torch.cuda.can_device_access_peer(own, i)]
    return f"cuda:{own} has no peer access to cuda:{away[0]}" if away else None
