"""Rows of an accelerator carried by a transport of the host: gloo is the group's backend for them.

Several processes can thus share one GPU, which NCCL refuses. The host waits in every call, so this is for tests.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from hecate.collectives.moves import Moves
from hecate.collectives.transport import Rows, Transport, Work
from hecate.ranks.messages import from_host, host_like, to_host

__all__ = ["ThroughHost"]


class ThroughHost(Transport):
    """Copies rows to pinned host memory and results back, both on the stream that is current at the time.

    Args:
        carrier: transport of the same group for rows in host memory.
    """

    def __init__(self, carrier: Transport) -> None:
        super().__init__(carrier.group, carrier.topology)
        self._carrier = carrier

    def gather(self, moves: Moves, sent: Rows, received: Rows) -> Work:
        rank = self.group.rank()
        leaving = {t.expert for t in moves.transfers if t.src == rank}
        arriving = {t.expert for t in moves.transfers if t.dst == rank}  # of the others nothing may be written back
        arrived = {expert: host_like(received[expert]) for expert in arriving}
        return self._back(self._carrier.gather(moves, _on_host(sent, leaving), arrived), arrived, received)

    def reduce(self, moves: Moves, contributed: Rows, sums: Rows, wire: torch.dtype) -> Work:
        totals = {expert: host_like(row) for expert, row in sums.items()}
        home = self._carrier.reduce(moves, _on_host(contributed, contributed.keys()), totals, wire)
        return self._back(home, totals, sums)

    def _back(self, work: Work, copies: Rows, rows: Rows) -> Work:
        def finish() -> None:
            work.wait()
            from_host(list(copies.values()), [rows[expert] for expert in copies])

        return Work(finish)


def _on_host(rows: Rows, experts: Collection[int]) -> Rows:
    wanted = [expert for expert in rows if expert in experts]
    return dict(zip(wanted, to_host([rows[expert] for expert in wanted]), strict=True))
