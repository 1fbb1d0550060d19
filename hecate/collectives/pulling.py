"""One rank's steps in a collective over memory that all ranks share: what it launches, with its waits and flags.

The steps come from generators: everything that a rank waits for between two `yield`s was signalled by others before
the first of them. A transport runs its rank's steps one after the other; one process that plays several ranks runs each
step for all ranks before the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from hecate.collectives.pulls import OWNED, GatherPulls, ReductionPulls
from hecate.collectives.routed import piece_of
from hecate.collectives.shared_memory import SLOTS, SharedMemory
from hecate.collectives.transport import Into, Rows
from hecate.ops.kernels.stack import ACCUMULATE_BLOCKS, Contributions, accumulate_rows
from hecate.ops.kernels.symmetric import await_flags, pull_rows, signal
from hecate.placement import Topology

__all__ = ["PullingRank"]

LEVELS = 1 << 20
"""More than a gather has rounds: flags count (collective, level) in one number."""


class PullingRank:
    """Launches the steps of one rank on the current stream.

    Args:
        rank: the rank.
        memory: of all ranks.
        topology: which ranks share a node; it decides the order of sums.
        device: of the rank.
        timeout: after which a rank that does not come is an error.
        engine_bytes: size from which on rows are pulled by copy engines; see `pull_rows`.
    """

    def __init__(
        self,
        rank: int,
        memory: SharedMemory,
        topology: Topology,
        device: torch.device,
        timeout: timedelta,
        engine_bytes: int | None = None,
    ) -> None:
        self._rank, self._memory, self._topology, self._device = rank, memory, topology, device
        self._timeout, self._engine_bytes = timeout, engine_bytes
        self._late = torch.zeros(1, dtype=torch.int64, device=device)

    def gather(self, number: int, pulls: GatherPulls, sent: Rows, received: Rows) -> Iterator[None]:
        """Steps of the gather that is collective `number`; see `Transport.gather`."""
        rows = [*sent.values(), *received.values()]

        def row(rank: int, index: int) -> Tensor:
            return self._memory.row(rank, number % SLOTS, index, rows[0].numel(), rows[0].dtype)

        self._pull([(sent[e], row(self._rank, at)) for at, e in pulls.staged])
        self._tell(pulls.tells, number, OWNED)
        yield
        for t, todo in enumerate(pulls.rounds):
            self._await_ready(todo.awaits, number)
            pairs = []
            for pull in todo.pulls:
                into = received[pull.hop.expert] if pull.kept is None else row(self._rank, pull.kept)
                pairs.append((piece_of(row(pull.hop.src, pull.row), pull.hop), piece_of(into, pull.hop)))
            self._pull(pairs)
            self._tell(todo.tells, number, t + OWNED + 1)
            yield
        self._pull([(row(self._rank, at), received[e]) for at, e in pulls.relayed])
        yield from self._release(number, pulls.sources, pulls.readers)

    def reduce(
        self, number: int, pulls: ReductionPulls, contributed: Rows, into: Sequence[Into], numel: int, wire: torch.dtype
    ) -> Iterator[None]:
        """Steps of the reduction that is collective `number`.

        Args:
            number: of the collective.
            pulls: this rank's part.
            contributed: this rank's rows, `[numel]` in `wire`.
            into: where sums go; each expert of `pulls.sums` has its row in one of them.
            numel: elements of a chunk.
            wire: dtype of all contributions.
        """

        def row(rank: int, index: int) -> Tensor:
            return self._memory.row(rank, number % SLOTS, index, numel, wire)

        staged = [(contributed[e], row(self._rank, at)) for at, e in pulls.leaving]
        self._pull([(x, place) for x, place in staged if x.data_ptr() != place.data_ptr()])
        self._tell(pulls.owners, number, OWNED)
        yield
        self._await_ready([(rank, OWNED) for rank in pulls.sources], number)
        chunks = {
            e: [contributed[e] if rank == self._rank else row(rank, at) for rank, at in sources]
            for e, sources in pulls.sums
        }
        nodes = {e: [self._topology.node_of(rank) for rank, _ in sources] for e, sources in pulls.sums}
        for target in into:
            found = [Contributions(at, chunks[e], nodes[e]) for e, at in target.row_of.items()]
            accumulate_rows(target.kinds, found, target.scale, target.overwrite, blocks=ACCUMULATE_BLOCKS)
        yield from self._release(number, pulls.sources, pulls.owners)

    def _pull(self, pulls: Sequence[tuple[Tensor, Tensor]]) -> None:
        pull_rows(pulls, self._device, self._engine_bytes)

    def _tell(self, readers: Iterable[int], number: int, level: int) -> None:
        value = number * LEVELS + level
        signal([(self._memory.ready(reader, self._rank), value) for reader in readers], self._device)

    def _await_ready(self, levels: Iterable[tuple[int, int]], number: int) -> None:
        self._await([(rank, self._memory.ready(self._rank, rank), number * LEVELS + level) for rank, level in levels])

    def _release(self, number: int, sources: Iterable[int], readers: Iterable[int]) -> Iterator[None]:
        """Tell those whose slots were read; then wait until nobody reads this rank's slot any more."""
        signal([(self._memory.done(source, self._rank), number + 1) for source in sources], self._device)
        yield
        self._await([(rank, self._memory.done(self._rank, rank), number + 1) for rank in readers])
        yield

    def _await(self, flags: Sequence[tuple[int, int, int]]) -> None:
        missing = await_flags([flag for _, *flag in flags], self._late, self._timeout, self._device)  # type: ignore[misc]
        if missing is not None:
            raise RuntimeError(
                f"Transport: rank {flags[missing][0]} has not come to a collective over shared memory within "
                f"{self._timeout.total_seconds():g} s, the process group's timeout"
            )
