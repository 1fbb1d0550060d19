"""Copies that stay for many steps and are trained (FlexMoE, arXiv 2304.03946): weights, gradients, optimizer state.

A device has rows for `memory_slots` of them per layer, for which all three are really allocated. They are no
parameters of the model: norms, checkpoints and the caller's optimizer know owners' rows only. Right before the caller's
optimizer steps, the owners send the final gradients to the copies, and an optimizer of the same class and settings
steps these. It updates each element by itself, so copies stay equal to their owners' rows. With the reduction to the
owners in the backward pass this is an all-reduce, whose second half nothing hides.

Whatever else writes to the owners' weights or loads the optimizer's state makes copies stale: they are dropped, see
`drop_if_stale`, until the policy makes new ones. Writes that PyTorch does not count are found when copies change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.collectives.moves import Moves, moves_between
from hecate.collectives.transport import Transport
from hecate.placement import Placement
from hecate.private_torch import in_backward
from hecate.ranks.agree import agree
from hecate.runtime.comms import Comms
from hecate.runtime.experts.pool import ExpertPool
from hecate.values.local import local_tensor

__all__ = ["KeptCopies"]

BY_ELEMENT = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")
"""Optimizers of torch that update each element of a tensor by itself, from this element's gradient and state."""


class KeptCopies:
    """The kept copies of all layers of one pool. Their placement is the same on all ranks.

    Attributes:
        parameters: kind -> `[rows, *shape]`; the copies of a layer are consecutive rows, by ascending expert id.
        placements: per layer, owners and kept copies.
        bytes_sent: per layer, bytes that all devices together have sent for gradients and new copies.

    Args:
        pool: owns the experts. Its owners must not change while there are copies.
        slots: per layer, most copies that a device may keep.
        comms: process groups and lanes; with several devices.
        layer: index of the layer for which time is counted that compute waits for gradients, those of all layers.
    """

    def __init__(self, pool: ExpertPool, slots: Sequence[int], comms: Comms, layer: int) -> None:
        self._pool = pool
        self.placements = [pool.placement(place) for place in range(len(slots))]
        self._first_row = list(accumulate(slots, initial=0))  # of each layer, and the number of rows
        self._comms = comms
        self._layer = layer
        self.parameters = {
            kind: nn.Parameter(local_tensor(p).new_zeros(self._first_row[-1], *p.shape[1:]), p.requires_grad)
            for kind, p in pool.parameters.items()
        }
        self._optimizers: dict[str, tuple[Optimizer, Optimizer]] = {}  # kind -> the caller's, and that of the copies
        self._written: tuple[tuple[int, int], ...] = ()  # what the weights were like after the last step
        self.bytes_sent = [0 for _ in slots]

    @property
    def any(self) -> bool:
        """Whether there are copies, on any device."""
        return any(p.matrix.sum() > p.num_experts for p in self.placements)

    def held(self, place: int) -> list[int]:
        """Ascending ids of a layer's experts of which this device keeps copies."""
        return (self.placements[place] - self._pool.placement(place)).held_by(self._pool.rank).tolist()

    def weights_of(self, place: int) -> dict[str, Tensor]:
        """Views kind -> `[n, *shape]` of a layer's copies, outside autograd."""
        first = self._first_row[place]
        return {kind: p.detach()[first : first + len(self.held(place))] for kind, p in self.parameters.items()}

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the copies."""
        return list({id(own): own for _, own in self._optimizers.values()}.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies' weights on this device."""
        return sum(p.nbytes for p in self.parameters.values())

    # A step of the caller's optimizer.

    def step(self, optimizer: Optimizer) -> None:
        """Step the copies of the weights that `optimizer` is about to step. Collective.

        Raises:
            ValueError: it does not update each element by itself.
            RuntimeError: it steps inside a backward pass, when gradients are not final.
        """
        kinds = {p: kind for kind, p in self._pool.parameters.items()}
        mine = {kinds[p] for group in optimizer.param_groups for p in group["params"] if p in kinds}
        if not mine:
            return
        self.drop_if_stale()
        _check_optimizer(optimizer)
        new = any(kind not in self._optimizers or self._optimizers[kind][0] is not optimizer for kind in mine)
        if new:
            self._optimizers |= dict.fromkeys(mine, (optimizer, self._like(optimizer)))
        if not self.any and not new:  # without copies the first step only allocates gradients and state
            return
        own = self._optimizers[next(iter(mine))][1]
        groups = [group for group in optimizer.param_groups if any(p in kinds for p in group["params"])]
        for group, same in zip(groups, own.param_groups, strict=True):
            same.update(_settings(group))
        self._send_gradients(sorted(mine))
        own.step()

    def stepped(self) -> None:
        """Called after the caller's optimizer has stepped."""
        self._written = self._now()

    def _like(self, optimizer: Optimizer) -> Optimizer:
        """An optimizer of the copies, with the class, groups and settings of `optimizer`."""
        mine = {p: self.parameters[kind] for kind, p in self._pool.parameters.items()}
        groups = [(group, [mine[p] for p in group["params"] if p in mine]) for group in optimizer.param_groups]
        kind: Any = type(optimizer)  # its arguments are those of its groups
        made: Optimizer = kind([{**_settings(group), "params": params} for group, params in groups if params])
        return made

    def _send_gradients(self, kinds: Sequence[str]) -> None:
        """Give copies the gradients of the owners' rows; weights without gradients get none."""
        moves = moves_between(self._owners, self._joined(self.placements))
        for kind in kinds:
            parameter, copies = self._pool.parameters[kind], self.parameters[kind]
            if parameter.grad is None:
                copies.grad = None
                continue
            if copies.grad is None:
                copies.grad = torch.zeros_like(copies)
            sent, received = self._ends(moves, local_tensor(parameter.grad), copies.grad)
            transport = _of(self._comms.reductions)
            transport.room_to_gather(moves, prod(parameter.shape[1:]), parameter.dtype)
            launch = partial(transport.gather, moves, sent, received)
            self._comms.gradients.start(self._layer, launch).wait()
            self._count(moves, parameter)

    # Other copies.

    def check(self) -> None:
        """Check that copies are in step with their owners, by the sums of each expert's weights. Collective.

        Raises:
            RuntimeError: on all ranks; weights were written in a way that `drop_if_stale` does not see.
        """
        moves = moves_between(self._owners, self._joined(self.placements))
        found = {}
        for kind, parameter in self._pool.parameters.items():
            theirs, own = _sums(local_tensor(parameter)), _sums(self.parameters[kind].detach())
            arrived = torch.zeros_like(own)
            sent, received = self._ends(moves, theirs, arrived)
            _of(self._comms.experts).gather(moves, sent, received).wait()
            found[kind] = (own - arrived)[:, 0].abs() - _tolerance(parameter.dtype) * arrived[:, 1]
        agree(lambda: self._check_sums(found))

    def _check_sums(self, beyond: Mapping[str, Tensor]) -> None:
        rows = list(self._rows().values())
        for kind, difference in beyond.items():
            if bool((difference[rows] > 0).any()):
                raise RuntimeError(
                    f"FSSDPConfig.policy='flexmoe': copies of expert weights {kind!r} are not equal to their owners' "
                    "any more; weights were written in a way that PyTorch does not count, through .data or another "
                    "tensor with their memory; write to the parameters themselves, under torch.no_grad()"
                )

    @property
    def _owners(self) -> Placement:
        """The owners of the experts of all layers."""
        return self._joined([self._pool.placement(place) for place in range(len(self.placements))])

    def change(self, placements: Sequence[Placement]) -> bool:
        """Keep the copies of `placements` from now on: new ones get weights and optimizer state. Collective.

        Between steps only.

        Returns:
            Whether they are others than before.
        """
        before, after = self._joined(self.placements), self._joined(placements)
        if before == after:
            return False
        moves = moves_between(self._owners, self._owners | (after - before))
        old = self._rows()
        self.placements = list(placements)
        for copies in self.parameters.values():
            copies.grad = None
        new = self._rows()
        stay = sorted(old.keys() & new.keys())
        with torch.no_grad():
            for source, target in self._pairs():
                values = target[[old[e] for e in stay]]
                target.zero_()
                target[[new[e] for e in stay]] = values
                sent, received = self._ends(moves, source, target)
                _of(self._comms.experts).gather(moves, sent, received).wait()
                self._count(moves, source)
        self._written = self._now()
        return True

    def drop(self) -> None:
        """Keep no copies, because their owners' weights or optimizer state have changed. All ranks must call it."""
        self.placements = [self._pool.placement(place) for place in range(len(self.placements))]

    def drop_if_stale(self) -> bool:
        """`drop` if something other than an optimizer's step has written to the owners' weights; returns whether."""
        stale = self.any and self._written != self._now()
        if stale:
            self.drop()
        return stale

    def _now(self) -> tuple[tuple[int, int], ...]:
        return tuple((p._version, local_tensor(p)._version) for p in self._pool.parameters.values())

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tensors of owners, `[slots, ...]`, with those of copies, `[rows, ...]`: weights and optimizer state.

        What is not kept per row, such as the number of steps, is copied.
        """
        for kind, parameter in self._pool.parameters.items():
            copies = self.parameters[kind]
            yield local_tensor(parameter), copies.detach()
            if kind not in self._optimizers:
                continue
            theirs, own = self._optimizers[kind]
            for key, value in sorted(theirs.state.get(parameter, {}).items()):
                if not isinstance(value, Tensor) or not value.ndim:
                    own.state[copies][key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                local = local_tensor(value)
                if key not in own.state[copies]:
                    own.state[copies][key] = local.new_zeros(len(copies), *local.shape[1:])
                yield local, own.state[copies][key]

    def _rows(self) -> dict[int, int]:
        """Expert, counted over the pool's layers -> row of its copy on this device."""
        firsts = accumulate((spec.num_experts for spec in self._pool.specs), initial=0)
        return {
            first + expert: self._first_row[place] + i
            for place, (first, _) in enumerate(zip(firsts, self._pool.specs, strict=False))
            for i, expert in enumerate(self.held(place))
        }

    def _ends(self, moves: Moves, source: Tensor, target: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Rows of `source` `[slots, ...]` that this device may send, and of `target` `[rows, ...]` that it receives."""
        slots, rows = self._pool.flat_rows().tolist(), self._rows()
        sent = {expert: row.view(-1) for expert, row in zip(slots, source, strict=True) if expert >= 0}
        arriving = (moves.dst - moves.src).held_by(self._pool.rank).tolist()
        return sent, {expert: target[rows[expert]].view(-1) for expert in arriving}

    def _count(self, moves: Moves, rows: Tensor) -> None:
        """Add what `moves` sends of `rows` to `bytes_sent`."""
        ends = np.cumsum([spec.num_experts for spec in self._pool.specs])
        row_bytes = rows.numel() // max(1, len(rows)) * rows.element_size()
        for transfer in moves.transfers:
            self.bytes_sent[int(np.searchsorted(ends, transfer.expert, side="right"))] += row_bytes

    @staticmethod
    def _joined(placements: Sequence[Placement]) -> Placement:
        """One placement of the experts of all layers."""
        return Placement(np.concatenate([p.matrix for p in placements]))


def _sums(rows: Tensor) -> Tensor:
    """Float64 `[n, 2]` of rows `[n, ...]`: their sums, and the sums of their absolute values."""
    flat = rows.flatten(1).double() if len(rows) else rows.new_zeros(0, 1, dtype=torch.float64)
    return torch.stack([flat.sum(1), flat.abs().sum(1)], dim=1)


def _tolerance(dtype: torch.dtype) -> float:
    """Relative difference of sums that rounding may cause: vectors and their remainders may be rounded differently."""
    return 1000 * torch.finfo(dtype).eps


def _of(transport: Transport | None) -> Transport:
    assert transport is not None  # with several devices there is one
    return transport


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params" and not key.startswith("hecate_")}


def _check_optimizer(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if type(optimizer) not in [getattr(torch.optim, known) for known in BY_ELEMENT]:
        raise ValueError(
            f"FSSDPConfig.policy='flexmoe' trains copies of experts apart from their owners, but {name} may not update "
            f"each element by itself; it must be one of torch.optim's {', '.join(BY_ELEMENT)}"
        )
    if in_backward():
        raise RuntimeError(
            f"FSSDPConfig.policy='flexmoe': {name} steps inside a backward pass, but copies need final gradients; step "
            "after backward()"
        )
