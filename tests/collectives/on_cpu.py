"""The transport for CUDA, without CUDA: its rounds on the host, or recorded without communication."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hecate.collectives.on_stream import RoutedOnStream
from hecate.collectives.route import Hop
from hecate.collectives.side_stream import SideStream
from hecate.collectives.transport import Work
from hecate.placement import Topology


class Rounds(RoutedOnStream):
    """The transport for CUDA run on CPU, with the host in place of the side stream."""

    def _on_stream(self, run: Callable[[], None], device: torch.device) -> Work:
        run()
        return Work(lambda: None)


Call = tuple[list[Hop], list[Hop]]


class Recorder(RoutedOnStream):
    """Records one rank's group calls without communicating."""

    def __init__(self, rank: int, topology: Topology) -> None:
        self._rank, self.topology, self._side = rank, topology, SideStream()
        self.calls: list[Call] = []

    def _post(self, sends: Sequence[tuple[Hop, Tensor]], receives: Sequence[tuple[Hop, Tensor]]) -> list:
        if sends or receives:
            self.calls.append(([h for h, _ in sends], [h for h, _ in receives]))
        return [lambda: None] * (len(sends) + len(receives))
