"""Plain transport, which the routed one is compared with: each transfer is one send and one receive, in one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.collectives.moves import Moves, Transfer
from hecate.collectives.summation import ordered_sum
from hecate.collectives.transport import Rows, Transport, Work

__all__ = ["PointToPoint"]


class PointToPoint(Transport):
    """Owners send every copy themselves, and get every contribution themselves."""

    def gather(self, moves: Moves, sent: Rows, received: Rows) -> Work:
        return self._start(moves, sent, lambda t: received[t.expert])

    def reduce(self, moves: Moves, contributed: Rows, sums: Rows, wire: torch.dtype) -> Work:
        rank = self.group.rank()
        parts: dict[int, dict[int, Tensor]] = {expert: {} for expert in sums}
        for expert in sums.keys() & contributed.keys():
            parts[expert][rank] = contributed[expert]

        def staging(t: Transfer) -> Tensor:
            parts[t.expert][t.src] = torch.empty_like(sums[t.expert], dtype=wire)
            return parts[t.expert][t.src]

        transfers = self._start(moves, contributed, staging)

        def finish() -> None:
            transfers.wait()
            for expert, rows in parts.items():
                if rows:
                    sums[expert].copy_(ordered_sum(rows, self.topology))
                else:
                    sums[expert].zero_()

        return Work(finish)

    def _start(self, moves: Moves, sent: Rows, place: Callable[[Transfer], Tensor]) -> Work:
        rank, transfers = self.group.rank(), moves.transfers
        operations = [self._operation(dist.isend, sent[t.expert], t.dst) for t in transfers if t.src == rank]
        operations += [self._operation(dist.irecv, place(t), t.src) for t in transfers if t.dst == rank]
        works = dist.batch_isend_irecv(operations) if operations else []

        def finish() -> None:
            for work in works:
                work.wait()

        return Work(finish)

    def _operation(self, operation: Callable[..., object], row: Tensor, peer: int) -> dist.P2POp:
        # Sent as bytes, so that every dtype travels on every backend.
        return dist.P2POp(operation, row.view(torch.uint8), group=self.group, group_peer=peer)
