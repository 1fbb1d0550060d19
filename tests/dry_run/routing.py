"""The experts that the routers of all ranks choose, and the answers that the hosts get when they read them.

Fake tensors have no values, so what a layer's counts say is made here: skewed, different in every call and rank, and
known on all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.runtime.step import passes
from hecate.runtime.tokens import by_node, counts, dispatch

__all__ = ["Routing"]


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
        with ExitStack() as stack:
            for module, name, wrapper in (
                (passes, "count_tokens", self._count_tokens),
                (dispatch, "node_dispatch", self._node_dispatch),
            ):
                original = getattr(module, name)
                stack.enter_context(mock.patch.object(module, name, _with(wrapper, original)))
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

    def _count_tokens(self, original: Callable[..., Any], call: dict[str, Any]) -> Any:
        self._call += 1
        num_experts, top_k = call["num_experts"], call["index"].shape[1]
        table = np.zeros((self._ranks, num_experts + counts.TRAINED + 1), dtype=np.int64)
        for rank, row in enumerate(table):
            row[:num_experts] = np.bincount(self.chosen(rank, num_experts, top_k).ravel(), minlength=num_experts)
            row[num_experts + counts.STEP :] = astuple(call["position"])
        self._pending = table
        got = original(**call)
        assert self._pending is None, "count_tokens: read nothing"
        return got

    def _node_dispatch(self, original: Callable[..., Any], call: dict[str, Any]) -> Any:
        """The rows that travel between nodes depend on which tokens chose what, so the counts do not say them."""
        plan, comms, top_k = call["plan"], call["comms"], call["index"].shape[1]
        topology, experts = comms.topology, len(plan.owners)
        per_node = topology.devices_per_node
        to_nodes = []
        for rank in range(self._ranks):
            pairs = by_node._pairs_of_copies(plan, torch.from_numpy(self.chosen(rank, experts, top_k)), rank)
            node = torch.from_numpy(plan.holders[:, 1].copy())[pairs] // per_node
            present = (node == torch.arange(topology.num_nodes).view(-1, 1, 1)).any(2)
            to_nodes.append(present.sum(1).numpy())
        both = np.zeros((2, self._ranks), dtype=np.int64)
        place = comms.rank % per_node
        both[0, place::per_node] = to_nodes[comms.rank]
        both[1, place::per_node] = [
            to_nodes[r][topology.node_of(comms.rank)] for r in range(place, self._ranks, per_node)
        ]
        self._pending = both
        return original(**call)


def _with(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    return lambda *args, **kwargs: wrapper(original, signature.bind(*args, **kwargs).arguments)


@cache
def _chosen(call: int, rank: int, tokens: int, num_experts: int, top_k: int) -> NDArray[np.int64]:
    random = np.random.default_rng((call, rank))
    # Popularity falls like 1 / rank among experts, in an order that most calls and ranks share.
    order = np.random.default_rng(call // 4).permutation(num_experts)
    scores = -np.log(np.arange(1, num_experts + 1))[order] + random.gumbel(size=(tokens, num_experts))
    return np.ascontiguousarray(np.argsort(-scores, axis=1)[:, :top_k], dtype=np.int64)
