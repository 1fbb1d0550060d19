"""Routes followed from the host: gloo, rows in the CPU's memory.

If a rank relays nothing, it starts all its messages in the call itself. Otherwise the call runs in the group's thread,
after earlier ones, so that pieces are relayed while the caller computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from hecate.collectives.queue import HostQueue
from hecate.collectives.route import Hop, Links, Part
from hecate.collectives.routed import Pieces, ReductionState, Routed, Waits, hops_of, nothing, piece_of
from hecate.collectives.transport import Rows, Work
from hecate.placement import Topology

__all__ = ["RoutedOnHost"]


class RoutedOnHost(Routed):
    """Messages are single sends and receives of the backend; `queue` is shared by all transports of the group."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology, links: Links, queue: HostQueue) -> None:
        super().__init__(group, topology, links)
        self._queue = queue

    def _start_gather(self, parts: Sequence[Part], rows: Rows, sent: Rows) -> Work:
        sends, receives = hops_of(parts)
        if self._queue.idle and all(h.expert in sent for h in sends):
            return self._at_once(*([(h, piece_of(rows[h.expert], h)) for h in hops] for hops in (sends, receives)))
        return self._queue.start(lambda: self._gather_when_ready(parts, rows))

    def _start_reduce(self, parts: Sequence[Part], state: ReductionState, device: torch.device) -> Work:
        sends, receives = hops_of(parts)
        if self._queue.idle and not any(h.partial for h in sends) and all(map(state.in_place, receives)):
            work = self._at_once([(h, state.payload(h)) for h in sends], [(h, state.place(h)) for h in receives])
            state.finish()
            return work
        return self._queue.start(lambda: self._run_reduction(parts, state, ahead=1))

    def _at_once(self, sends: Pieces, receives: Pieces) -> Work:
        waits = self._post(sends, receives)

        def finish() -> None:
            for wait in waits:
                wait()

        return Work(finish)

    def _gather_when_ready(self, parts: Sequence[Part], rows: Rows) -> None:
        """Start all receives, which go to their final place; then each send when what it carries has arrived."""
        receives = [(h, piece_of(rows[h.expert], h)) for part in parts for h in part.receives]
        waits = self._post([], receives)
        arriving = {(h.expert, h.piece): wait for (h, _), wait in zip(receives, waits, strict=True)}
        sending: Waits = []
        for hop in (h for part in parts for h in part.sends):
            arriving.pop((hop.expert, hop.piece), nothing)()
            sending += self._post([(hop, piece_of(rows[hop.expert], hop))], [])
        for wait in (*arriving.values(), *sending):
            wait()

    def _post(self, sends: Pieces, receives: Pieces) -> Waits:
        group, works = self.group, []
        for hop, piece in sends:
            data = piece.view(torch.uint8)  # sent as bytes, so that every dtype travels on every backend
            works.append(dist.isend(data, group=group, tag=tag_of(hop, data.numel()), group_dst=hop.dst))
        for hop, piece in receives:
            data = piece.view(torch.uint8)
            works.append(dist.irecv(data, group=group, tag=tag_of(hop, data.numel()), group_src=hop.src))
        return [work.wait for work in works if work is not None]


def tag_of(hop: Hop, num_bytes: int) -> int:
    """Distinguishes pieces that may arrive early, and sizes: gloo accepts a short message for a long one.

    Messages with the same sender, receiver and tag match in the order they are started in.
    """
    return 4 * (num_bytes % 2**29) + (1 + hop.partial if hop.alone else 0)
