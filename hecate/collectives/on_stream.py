"""Routes followed on a CUDA side stream: NCCL, each round one group call; the host waits for nothing.

Why group calls cannot deadlock: NCCL ends a group call when, for each of its messages, the peer has entered the group
call with the other half; on first use of a connection the host also waits for that. Both halves of a hop are in group
calls of the same collective and round, and every rank enters its group calls in ascending order of (collective, round).
So among the group calls that have not ended, the lowest one has been entered by all its ranks, and therefore ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.route import Links, Part
from hecate.collectives.routed import Pieces, ReductionState, Routed, Waits, nothing, piece_of
from hecate.collectives.side_stream import SideStream
from hecate.collectives.transport import Rows, Work
from hecate.placement import Topology

__all__ = ["RoutedOnStream"]


class RoutedOnStream(Routed):
    """Each round's messages are one group call, which starts and ends as a whole."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology, links: Links) -> None:
        super().__init__(group, topology, links)
        self._side = SideStream()

    def _start_gather(self, parts: Sequence[Part], rows: Rows, sent: Rows) -> Work:
        return self._on_stream(lambda: self._gather_in_rounds(parts, rows), next(iter(rows.values())).device)

    def _start_reduce(self, parts: Sequence[Part], state: ReductionState, device: torch.device) -> Work:
        # Receives are not started before their round: they would block the sends of earlier rounds on the stream.
        return self._on_stream(lambda: self._run_reduction(parts, state, ahead=0), device)

    def _on_stream(self, run: Callable[[], None], device: torch.device) -> Work:
        return self._side.run(run, device)

    def _gather_in_rounds(self, parts: Sequence[Part], rows: Rows) -> None:
        """One group call per round; the stream runs them one after the other."""
        for part in parts:
            sends, receives = ([(h, piece_of(rows[h.expert], h)) for h in hops] for hops in (part.sends, part.receives))
            for wait in self._post(sends, receives):
                wait()

    def _post(self, sends: Pieces, receives: Pieces) -> Waits:
        """A group call is already waited for, by the stream; its waits do nothing."""

        def operation(run: Callable[..., object], piece: Tensor, peer: int) -> dist.P2POp:
            return dist.P2POp(run, piece.view(torch.uint8), group=self.group, group_peer=peer)

        operations = [operation(dist.isend, piece, hop.dst) for hop, piece in sends]
        operations += [operation(dist.irecv, piece, hop.src) for hop, piece in receives]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return [nothing] * len(operations)
