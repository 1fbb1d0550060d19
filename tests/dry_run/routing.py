"""The experts that the routers of all ranks choose, and the answers that the hosts get when they read them.

Fake tensors have no values, so what a layer's counts say is made here: skewed, different in every call and rank, and
known on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.runtime.tokens.counts import STEP, TRAINED, Counting

__all__ = ["Routing"]

Counts = tuple[NDArray[np.int64], NDArray[np.int64]]


class Routing:
    """What every rank's router chooses in every call of a layer.

    Args:
        ranks: ranks that share the experts.
        tokens: rank and number of the forward pass -> tokens of that rank.
    """

    def __init__(self, ranks: int, tokens: Callable[[int, int], int]) -> None:
        self._ranks = ranks
        self._tokens = tokens
        self._call = -1
        self._pending: NDArray[np.int64] | None = None
        self.passes = -1  # number of the running forward pass

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Context in which the layers' host reads are foreseen: `answer` knows their values."""
        with mock.patch.multiple(
            Counting, wait=self._waiting(Counting.wait), send_to_host=self._sending(Counting.send_to_host)
        ):
            yield

    def answer(self, read: Tensor) -> Tensor | None:
        """The values of `read`, once per foreseen read; None for any other."""
        pending = self._pending
        if pending is None or pending.size != read.numel():
            return None
        self._pending = None
        return torch.from_numpy(pending).view(read.shape).to(read.dtype)

    def chosen(self, rank: int, num_experts: int, top_k: int) -> NDArray[np.int64]:
        """`[T, k]`: the experts of each token of that rank in the present call of a layer."""
        return _chosen(self._call, rank, self._tokens(rank, self.passes), num_experts, top_k)

    def _waiting(self, wait: Callable[..., Counts]) -> Callable[..., Counts]:
        """`Counting.wait`, which reads the table of all ranks' rows."""

        def wait_for_table(counting: Counting, names: Sequence[str]) -> Counts:
            if counting._copy is not None:  # answered when it was sent to the host
                return wait(counting, names)
            self._call += 1
            self._pending = self._table(counting)
            counts = wait(counting, names)
            assert self._pending is None, "Counting.wait: read nothing"
            return counts

        return wait_for_table

    def _sending(self, send: Callable[[Counting], None]) -> Callable[[Counting], None]:
        """`Counting.send_to_host`, which reads the same table, later."""

        def send_table(counting: Counting) -> None:
            self._call += 1
            self._pending = self._table(counting)
            send(counting)
            assert self._pending is None, "Counting.send_to_host: sent nothing"

        return send_table

    def _table(self, counting: Counting) -> NDArray[np.int64]:
        experts, most = counting._num_experts, counting._most
        table = np.zeros((self._ranks, most + TRAINED + 1), dtype=np.int64)
        for rank, row in enumerate(table):
            row[:experts] = np.bincount(self.chosen(rank, experts, counting._top_k).ravel(), minlength=experts)
            row[most + STEP :] = counting._position.numbers
        return table


@cache
def _chosen(call: int, rank: int, tokens: int, num_experts: int, top_k: int) -> NDArray[np.int64]:
    random = np.random.default_rng((call, rank))
    # Popularity falls like 1 / rank among experts, in an order that most calls and ranks share.
    order = np.random.default_rng(call // 4).permutation(num_experts)
    scores = -np.log(np.arange(1, num_experts + 1))[order] + random.gumbel(size=(tokens, num_experts))
    return np.ascontiguousarray(np.argsort(-scores, axis=1)[:, :top_k], dtype=np.int64)
