"""The two sparse collectives over shared memory, of 4 virtual ranks with 2 slots each; `gpu_check.py` runs it.

Bytes are counted as read and written once: of a gather, each copy; of a reduction, each contribution, and each row of
gradients read and written in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import copy_ceiling, emit, seconds
from benchmarks.virtual_ranks import VirtualRanks
from hecate.collectives.moves import Moves, moves_between
from hecate.collectives.route import Links
from hecate.collectives.summation import ordered_sum
from hecate.collectives.transport import Into, Rows
from hecate.cost import CostModel
from hecate.ops.kernels.stack import KindRows
from hecate.placement import Placement, Topology

__all__ = ["symmetric_speed"]

RANKS, OWNED = 4, 4
NEVER = 2**62
"""Rows of that size are pulled by copy engines: none."""


@dataclass(frozen=True)
class Workload:
    """Copies of one layer: their placement, elements of an expert, and elements of its first weight kind."""

    name: str
    src: Placement
    dst: Placement
    numel: int
    first: int

    @property
    def moves(self) -> Moves:
        """Of the gather."""
        return moves_between(self.src, self.dst)


def workloads(device: torch.device) -> list[Workload]:
    """Experts of Qwen3-30B-A3B: 8 of them with a copy each, or 2 hot ones with a copy on every rank."""
    hidden, width = (768, 2048) if device.type == "cuda" else (24, 32)
    experts = np.arange(RANKS * OWNED)
    src = Placement.from_owners(experts // OWNED, RANKS)
    apart, hot = src.matrix.copy(), src.matrix.copy()
    for rank in range(RANKS):
        apart[(rank + 1) % RANKS * OWNED + np.arange(2), rank] = True
    hot[[0, OWNED]] = True
    size = f"{RANKS} virtual ranks, 2 slots, experts of {3 * hidden * width} elements"
    names = (f"{size}, 8 experts with a copy each", f"{size}, 2 experts with a copy on every rank")
    return [
        Workload(name, src, Placement(dst), 3 * hidden * width, 2 * hidden * width)
        for name, dst in zip(names, (apart, hot), strict=True)
    ]


def symmetric_speed(device: torch.device) -> None:
    """Times in percent of a large copy, and what remains of them behind an attention."""
    clock = Clock(device)
    emit("large copy", "torch", "bytes per second", clock.ceiling, "B/s")
    emit("attention of 4k tokens", "torch", "time", 1e6 * clock.alone, "us")
    for load in workloads(device):
        for name, engine_bytes in (("copy engines", 1), ("the kernel", NEVER)):
            clock.measure(load.name, f"spAG by {name}", *_gather(load, device, engine_bytes))
        for wire in (torch.bfloat16, torch.float32):
            clock.measure(load.name, f"spRS of {wire}", *_reduce(load, device, wire))


class Clock:
    """Measures collectives of virtual ranks: on the device alone, because one host thread launches for all ranks.

    Attributes:
        ceiling: bytes per second of a large copy.
        alone: seconds of an attention.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._attention = device, _attention(device)
        size = 8192 if device.type == "cuda" else 8
        self._filler = torch.ones(size, size, dtype=torch.bfloat16, device=device)
        self.ceiling = copy_ceiling(device)
        self.alone = self._seconds(self._attention)

    def measure(self, setting: str, name: str, run: Callable[[], None], moved: int) -> None:
        """Emit the time of `run`, which must move so many bytes, and by how much it makes the attention longer."""
        taken = self._seconds(run)
        emit(setting, name, "time", 1e6 * taken, "us")
        emit(setting, name, "of the copy", 100 * moved / taken / self.ceiling, "%")
        both = self._seconds(lambda: _beside(run, self._attention, self._device))
        emit(setting, name, "exposed behind attention", 100 * max(0.0, both - self.alone) / self.alone, "%")

    def _seconds(self, run: Callable[[], object]) -> float:
        return seconds(run, self._device, prepare=self._keep_busy)

    def _keep_busy(self) -> tuple[()]:
        """Give the device some milliseconds of work, during which the host launches what is measured."""
        for _ in range(4):
            self._filler @ self._filler
        return ()


def _beside(run: Callable[[], None], attention: Callable[[], object], device: torch.device) -> None:
    """The collective on streams of its own, and the attention on the current one."""
    if device.type != "cuda":
        run()
        attention()
        return
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    attention()
    current.wait_stream(side)


def _attention(device: torch.device) -> Callable[[], Tensor]:
    """Of 4096 tokens with 32 heads of 128, causal, in bfloat16."""
    shape = (1, 32, 4096, 128) if device.type == "cuda" else (1, 2, 16, 8)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _ranks(load: Workload, device: torch.device, engine_bytes: int | None = None) -> VirtualRanks:
    topology = Topology(RANKS, RANKS)
    links = Links.of(CostModel(), topology, "cuda")
    return VirtualRanks(topology, links, device, 4 * 4 * load.numel + 4096, engine_bytes)


def _gather(load: Workload, device: torch.device, engine_bytes: int) -> tuple[Callable[[], None], int]:
    """The gather, checked once, and the bytes that it must move."""
    ranks, moves = _ranks(load, device, engine_bytes), load.moves
    rows = {e: _random(device, load.numel, e) for e in range(load.src.num_experts)}
    sent: list[Rows] = [{e: rows[e] for e in load.src.held_by(rank).tolist()} for rank in range(RANKS)]
    new = load.dst - load.src
    received: list[Rows] = [{e: torch.zeros_like(rows[e]) for e in new.held_by(rank).tolist()} for rank in range(RANKS)]

    def run() -> None:
        ranks.gather(moves, sent, received)

    run()
    same = all(torch.equal(row, rows[e]) for got in received for e, row in got.items())
    _check(load.name, "spAG by copy engines" if engine_bytes == 1 else "spAG by the kernel", same)
    return run, 2 * len(moves.transfers) * rows[0].nbytes


def _reduce(load: Workload, device: torch.device, wire: torch.dtype) -> tuple[Callable[[], None], int]:
    """The reduction into gradients, checked once, and the bytes that it must move."""
    ranks, moves = _ranks(load, device), load.moves.reversed
    moving = sorted({int(t.expert) for t in moves.transfers})
    held = [[e for e in moving if load.dst.matrix[e, rank]] for rank in range(RANKS)]
    grads = {(e, rank): _random(device, load.numel, 10 * e + rank, wire) for rank in range(RANKS) for e in held[rank]}
    stacks = [
        [torch.zeros(OWNED, n, device=device) for n in (load.first, load.numel - load.first)] for _ in range(RANKS)
    ]
    into = [
        Into(
            [KindRows(stacks[rank][0], 0), KindRows(stacks[rank][1], load.first)],
            {e: e % OWNED for e in moving if load.src.owners[e] == rank},
            scale=1 / RANKS,
        )
        for rank in range(RANKS)
    ]
    slots: list[list[Rows]] = []
    for _ in range(2):  # contributions stay packed in both slots, which collectives use in turn
        rooms = ranks.room(moves, load.numel, wire)
        slots.append([dict(zip(held[rank], room, strict=True)) for rank, room in enumerate(rooms)])
        for rank, rows in enumerate(slots[-1]):
            for e, row in rows.items():
                row.copy_(grads[e, rank])
        ranks.accumulate(moves, slots[-1], into, load.numel, wire)
    _check(load.name, f"spRS of {wire}", _right(load, grads, stacks, moving))
    turns = cycle(slots)

    def run() -> None:
        ranks.accumulate(moves, next(turns), into, load.numel, wire)

    return run, len(grads) * load.numel * wire.itemsize + 8 * len(moving) * load.numel


def _check(setting: str, name: str, right: bool) -> None:
    emit(setting, name, "right", float(right))
    if not right:
        raise SystemExit(f"{name} is wrong: {setting}")


def _right(
    load: Workload, grads: dict[tuple[int, int], Tensor], stacks: list[list[Tensor]], moving: Sequence[int]
) -> bool:
    """Whether the gradients are twice the mean over the ranks, summed in the right order."""
    for e in moving:
        total = ordered_sum({r: row for (x, r), row in grads.items() if x == e}, Topology(RANKS, RANKS))
        got = torch.cat([stack[e % OWNED] for stack in stacks[int(load.src.owners[e])]])
        if not torch.equal(got, total / RANKS + total / RANKS):
            return False
    return True


def _random(device: torch.device, numel: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
