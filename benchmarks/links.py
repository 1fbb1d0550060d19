"""Measures a `hecate.cost.CostModel` of the ranks it runs on: compute, links, and how much of a transfer compute hides.

    python -m benchmarks.links FILE --devices 2                          # processes on this machine
    python -m benchmarks.links FILE --nodes 2 --devices 4 --inter-mbit 400 --cpu 0.22   # on an emulated cluster
    python -m hecate.train fssdp.cost=FILE ...

All ranks compute, or send and receive, at the same time, as in training, so that devices of one node share its link.
The hidden share is the smaller one of the links inside and between nodes. With one node both bandwidths are the same,
and nothing is hidden: the cores that compute also copy the bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import cluster
from hecate.cost import CostModel

SIDE = 192  # of the square matrices whose product is timed
REPEATS = 5
TRANSFER = 4_000_000  # bytes; long beside the 5 ms in which a rank may use up its share of the CPU


def main() -> int:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="profile to write")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=2, help="per node")
    parser.add_argument("--inter-mbit", type=int, help="emulate nodes with this bandwidth between them")
    parser.add_argument("--cpu", type=float, help="cores per device of an emulated cluster")
    given = parser.parse_args()
    if "RANK" in os.environ:
        measure(given.file)
        return 0
    cluster.tear_down_on_signals()
    command = [sys.executable, "-m", "benchmarks.links", str(given.file)]
    if given.inter_mbit is None:
        return cluster.run(command, cluster.loopback(given.nodes, given.devices))
    try:
        with cluster.emulated(given.nodes, given.devices, given.inter_mbit, given.cpu) as ranks:
            return cluster.run(command, ranks)
    except cluster.MissingError as missing:
        print(f"benchmarks.links: an emulated cluster needs {missing}", file=sys.stderr)
        return cluster.SKIPPED


def cost_of(ranks: Sequence[cluster.Rank], folder: str) -> list[str]:
    """Measure `ranks`; returns the override that sets their cost model, or none for one rank, which has no links."""
    if len(ranks) < 2:
        return []
    file = f"{folder}/cost.json"
    if code := cluster.run([sys.executable, "-m", "benchmarks.links", file], ranks):
        raise RuntimeError(f"benchmarks.links: exit code {code}")
    return [f"fssdp.cost={file}"]


def measure(file: Path) -> None:
    """One rank's part; rank 0 writes and prints the profile."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size, per_node = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    first = rank // per_node * per_node
    inside = (first + (rank - first + 1) % per_node, first + (rank - first - 1) % per_node)
    across = ((rank + per_node) % size, (rank - per_node) % size)
    near, far = (peers if peers[0] != rank else None for peers in (inside, across))
    near = near or far
    far = far if size > per_node else near
    if near is None or far is None:
        raise SystemExit("benchmarks.links: one rank has no links; use at least 2")
    products = 1 + int(0.2 / _seconds(lambda: _compute(1)))
    found = CostModel(
        intra_node_bandwidth=_bandwidth(near),
        inter_node_bandwidth=_bandwidth(far),
        message_ns=int(1e9 * _seconds(lambda: _exchange(torch.zeros(1), far))),
        flops=int(2 * SIDE**3 * products / _seconds(lambda: _compute(products))),
        hidden_permille=min(_hidden(near), _hidden(far)) if size > per_node else 0,  # the policies know one share
    )
    if rank == 0:
        found.save(file)
        print(found)
    dist.destroy_process_group()


def _bandwidth(peers: tuple[int, int]) -> int:
    """Bytes per second and device."""
    return int(TRANSFER / _seconds(lambda: _exchange(torch.zeros(TRANSFER // 4), peers)))


def _hidden(peers: tuple[int, int]) -> int:
    """Share in 1/1000 of a transfer's time that compute of the same length saves when both run at once."""
    row = torch.zeros(TRANSFER // 4)
    transfer = _seconds(lambda: _exchange(row, peers))
    products = max(1, round(transfer / _seconds(lambda: _compute(1))))
    compute = _seconds(lambda: _compute(products))
    both = _seconds(lambda: _exchange(row, peers, lambda: _compute(products)))
    return round(1000 * min(1.0, max(0.0, (compute + transfer - both) / min(compute, transfer))))


def _compute(products: int) -> None:
    a, b, c = (torch.ones(SIDE, SIDE) for _ in range(3))
    for _ in range(products):
        torch.mm(a, b, out=c)


def _exchange(row: Tensor, peers: tuple[int, int], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Send `row` to one peer and receive as much from the other one."""
    works = [dist.isend(row, peers[0]), dist.irecv(torch.empty_like(row), peers[1])]
    meanwhile()
    for work in works:
        if work is not None:
            work.wait()


def _seconds(run: Callable[[], None]) -> float:
    """Median seconds of `run` on all ranks at once, mean over the ranks. Collective."""
    run()
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    total = torch.tensor(median(times), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


if __name__ == "__main__":
    sys.exit(main())
