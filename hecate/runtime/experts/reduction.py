"""A reduction of one layer's gradients to the owners, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from hecate.runtime.comms import Pending

__all__ = ["Reduction", "nothing", "runs"]


class Reduction:
    """A running reduction of gradients to the owners.

    Args:
        home: the transfers.
        add_own: adds the gradients of experts that only their owner holds; there is nothing to wait for.
        add_sums: adds the sums that arrive.
    """

    def __init__(self, home: Pending, add_own: Callable[[], None], add_sums: Callable[[], None]) -> None:
        self._home = home
        self._add_own: Callable[[], None] | None = add_own
        self._add_sums = add_sums

    def add_own(self) -> None:
        """Add what needs no transfer to the owners' gradients; further calls do nothing."""
        add, self._add_own = self._add_own, None
        if add is not None:
            add()

    def finish(self) -> None:
        """Wait for the transfers and add the sums to the owners' gradients."""
        self.add_own()
        self._home.wait()
        self._add_sums()
        self._add_sums = nothing  # which holds the sums

    def discard(self) -> None:
        """Wait for the transfers and ignore their results: the backward pass that they belong to failed.

        Sums that a transport has added to gradients by itself stay there, as plain PyTorch keeps what a failed pass has
        accumulated.
        """
        self._add_own, self._add_sums = None, nothing
        self._home.wait()


def nothing() -> None:
    """Do nothing."""


def runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending positions as ranges [first, last)."""
    for _, run in groupby(enumerate(positions), lambda pair: pair[1] - pair[0]):
        found = [position for _, position in run]
        yield found[0], found[-1] + 1
