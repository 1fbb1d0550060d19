"""Save and load a training state of about 1 GB, beside torch.save and torch.load of the same bytes.

    python -m benchmarks.checkpoint --json benchmarks/results/checkpoint.json

Ours: `engine.save` and `engine.load` of a GPT-MoE with AdamW on several processes. Torch's: to save, every process
computes the CRC-32 of the tensors that it holds, writes them with torch.save and syncs the file; to load, it computes
the CRC-32 of the file, loads it with torch.load and copies the tensors into place. Both are measured in turn, in one
run; the files that are read were written by the same run and are in the page cache. The time of a round is that of the
slowest process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import hecate
from benchmarks.report import Report
from hecate.models import GPTMoE, ModelConfig
from hecate.values.local import local_tensor

SUBJECTS = ("hecate", "torch.save, torch.load")
BLOCK = 1 << 22
TARGET = 1.5
"""Required upper limit of our time, as a multiple of torch's."""


def build(gigabytes: float) -> tuple[hecate.FSSDP, torch.optim.Optimizer]:
    """A model after one step, whose weights and AdamW state together have about the given size."""
    experts, width, ratio = 16, 512, 2
    layer_bytes = 3 * 4 * experts * 2 * ratio * width * width  # weights and two moments of an expert's two matrices
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    config = ModelConfig(256, width, layers, num_heads=8, num_experts=experts, max_length=32, expert_ratio=ratio)
    model = GPTMoE(config)
    model.init_weights(seed=0)
    engine = hecate.fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(256, (2, 33))
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return engine, optimizer


def held(engine: hecate.FSSDP, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of this process's part of the state, sharing its memory."""
    tensors = {}
    for name, parameter in engine.model.named_parameters():
        tensors[name] = local_tensor(parameter)
        tensors |= {f"{name}.{key}": local_tensor(v) for key, v in optimizer.state[parameter].items()}
    return tensors


def torch_save(path: Path, tensors: dict[str, Tensor]) -> None:
    """CRC-32 of every tensor, torch.save, fsync."""
    for tensor in tensors.values():
        zlib.crc32(tensor.reshape(-1).numpy().data)
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def torch_load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Compute the CRC-32 of the file, load it with torch.load, and copy the tensors into place."""
    checksum, buffer = 0, memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
    for name, tensor in torch.load(path).items():
        tensors[name].copy_(tensor)


def timed(action: Callable[[], object]) -> float:
    """Seconds that the slowest process takes."""
    dist.barrier()
    begin = time.perf_counter()
    action()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def measure(folder: Path, gigabytes: float, rounds: int) -> tuple[float, dict[tuple[str, str], list[float]]]:
    """Total bytes, and seconds per round by (subject, "save" or "load")."""
    engine, optimizer = build(gigabytes)
    tensors = held(engine, optimizer)
    total = torch.tensor(float(sum(t.nbytes for t in tensors.values())), dtype=torch.float64)
    dist.all_reduce(total)
    plain, ours = folder / f"rank{dist.get_rank()}.pt", folder / "checkpoint"
    actions = {
        (SUBJECTS[1], "save"): lambda: torch_save(plain, tensors),
        (SUBJECTS[0], "save"): lambda: engine.save(ours, optimizer),
        (SUBJECTS[1], "load"): lambda: torch_load(plain, tensors),
        (SUBJECTS[0], "load"): lambda: engine.load(ours, optimizer),
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in actions}
    for _ in range(rounds + 1):
        for key, action in actions.items():
            seconds[key].append(timed(action))
        if dist.get_rank() == 0:
            shutil.rmtree(ours)
        plain.unlink()
        os.sync()
    return float(total), {key: values[1:] for key, values in seconds.items()}  # the first round warms up


def work(rank: int, world: int, port: int, gigabytes: float, rounds: int, folder: str, answer: mp.SimpleQueue) -> None:
    """One process."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    result = measure(Path(folder), gigabytes, rounds)
    if rank == 0:
        answer.put(result)
    dist.destroy_process_group()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answer = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        inputs = (arguments.processes, store.port, arguments.gigabytes, arguments.rounds, folder, answer)
        mp.spawn(work, inputs, arguments.processes)
    total, seconds = answer.get()
    setting = f"{total / 1e9:.2f} GB of weights and AdamW state, {arguments.processes} processes"
    report = fill(setting, seconds)
    for metric in ("seconds", "times torch's"):
        for action in ("save", "load"):
            print(report.table(f"{action}, {metric}"), end="\n\n")
    if arguments.json:
        report.write(arguments.json)


def fill(setting: str, seconds: dict[tuple[str, str], list[float]]) -> Report:
    """Report medians. The ratio is the median of the ratios per round, as the disk's speed differs between rounds."""
    report = Report()
    for (subject, action), values in seconds.items():
        report.add(setting, subject, f"{action}, seconds", statistics.median(values), "s")
    for action in ("save", "load"):
        pairs = zip(seconds[SUBJECTS[0], action], seconds[SUBJECTS[1], action], strict=True)
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        report.add(setting, "to show, at most", f"{action}, times torch's", TARGET)
        report.add(setting, SUBJECTS[0], f"{action}, times torch's", statistics.median(ratios))
        report.add(setting, "best round", f"{action}, times torch's", ratios[0])
        report.add(setting, "worst round", f"{action}, times torch's", ratios[-1])
    return report


if __name__ == "__main__":
    main()
