"""The dispatch in two halves: the exchange of one half of the rows runs while experts compute the other.

Every device sends each holder of an expert the first half of the rows that the plan gives it, then the rest. So the
halves follow from the plan alone, are balanced as the whole is (up to one row per source and holder), and each row is
computed as in one exchange: the results are the same, and so are the gradients of tokens and of the router's weights.
Gradients of experts are sums over two products. Only the direct dispatch is halved; the node-aware one is several
exchanges already.

Shapes: T tokens of this device, k experts per token, N rows sent, M rows received, d model width, P (expert, device)
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate._native import direct_tables
from hecate.cost import LayerCost
from hecate.ops.linear import Begun
from hecate.ops.permute import block_order
from hecate.ops.upload import upload
from hecate.planning.plan import Plan
from hecate.runtime.tokens.straight import Part, Straight

__all__ = ["HalvedDispatch", "halved", "halves_pay"]


@dataclass(frozen=True, eq=False)
class HalvedDispatch:
    """Where this device's rows go, half by half. Made once per layer and micro-batch.

    Attributes:
        tokens: packs tokens into rows in the order (half, destination, expert), and adds up such rows.
        halves: the exchanges, of rows that are packed.
    """

    tokens: Straight
    halves: tuple[Straight, Straight]

    def begin(self, hidden: Tensor, dtype: torch.dtype, meanwhile: Callable[[], None]) -> list[Begun]:
        """Send tokens `[T, d]`; per half what ends with the rows `[M, d]` that this device computes. Collective.

        Args:
            hidden: the tokens.
            dtype: dtype of the rows, in which the experts compute.
            meanwhile: called in backward while the last rows' gradients are on their way back.
        """
        rows = self.tokens.pack(hidden, dtype).split([half.order.numel() for half in self.halves])
        first, second = self.halves
        begun = Begun(rows[0], first.leave, lambda grad: first.come_home(grad, meanwhile))
        try:
            return [begun, Begun(rows[1], second.leave, second.come_home)]
        except BaseException:
            begun.abandon()
            raise

    def begin_return(self, half: Straight, rows: Tensor) -> Begun:
        """Send the results of a half, `[M, d]`, home. Collective."""
        return Begun(rows, half.come_home, half.leave)

    def add_up(self, home: Sequence[Tensor], weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums `[T, d]` per token of both halves' results, weighted by `weights` `[T, k]`."""
        return self.tokens.add_up(torch.cat(list(home)), weights, dtype)


def halves_pay(plan: Plan, cost: LayerCost) -> bool:
    """Whether two halves are predicted to be faster. Integers only, so the answer is the same on all ranks.

    Rows leave, are computed and return: `way + compute + way`. In halves that is `way + max(way, compute)`, in forward
    and in backward, for what the cost model says can be hidden.
    """
    topology, model = plan.topology, cost.model
    devices = topology.num_devices
    rows, inside = plan.rows
    far = (rows - inside) // devices * cost.token_bytes * 1_000_000_000 // model.inter_node_bandwidth
    near = (inside - rows // devices) // devices * cost.token_bytes * 1_000_000_000 // model.intra_node_bandwidth
    way, messages, compute = max(far, near), devices * model.message_ns, cost.token_ns(rows // devices)
    hidden = min(way, compute // 3) + min(way, 2 * compute // 3)
    # A twentieth for what is not in the model: products of fewer rows, one more pass over the rows.
    return hidden * model.hidden_permille // 1000 > 4 * messages + (4 * way + compute) // 20


def halved(whole: Straight, plan: Plan, local_rows: Sequence[int]) -> HalvedDispatch:
    """Divide a dispatch. The host does not wait for the device.

    Args:
        whole: made from `plan`.
        plan: the plan.
        local_rows: experts held here, in the order of their rows.
    """
    rank, device = whole.comms.rank, whole.order.device
    quotas = ((plan.quota + 1) // 2, plan.quota // 2)
    found = [direct_tables(plan.holders, quota, rank, list(local_rows)) for quota in quotas]
    arrivals = [table[2 * leaving :] for table, leaving, *_ in found]
    by_half = _by_half(plan.holders, plan.quota[rank])
    parts = upload(torch.from_numpy(np.concatenate([by_half.ravel(), *arrivals])), device)
    by_half_there, *blocks = parts.split([by_half.size, *map(len, arrivals)])
    tokens = whole.with_order(whole.order.index_select(0, block_order(by_half_there.view(2, -1), len(whole.order))))
    halves = []
    for (_, _, sent, received, sizes), block in zip(found, blocks, strict=True):
        order = torch.arange(sum(sent), device=device)
        part = Part(order, sent, received, block.view(2, -1) if len(block) else None, sizes)
        halves.append(whole.of_packed(part))
    return HalvedDispatch(tokens, (halves[0], halves[1]))


def _by_half(holders: NDArray[np.int64], to_pair: NDArray[np.int64]) -> NDArray[np.int64]:
    """From the order (destination, expert) to (half, destination, expert), as `block_order` takes it.

    Args:
        holders: int64 `[P, 2]`, the (expert, device) pairs.
        to_pair: int64 `[P]`, rows that this device sends to each.
    """
    rows = to_pair[np.lexsort((holders[:, 0], holders[:, 1]))]
    first = (rows + 1) // 2
    begins = np.cumsum(rows) - rows
    old, lengths = np.concatenate([begins, begins + first]), np.concatenate([first, rows - first])
    return np.stack([old - (np.cumsum(lengths) - lengths), lengths])
