"""Peak memory of sharding a model that was built on the meta device, and of giving it values.

    python -m benchmarks.memory --json benchmarks/results/memory.json

Each of 8 processes (gloo, one machine) shards a Mixtral of about 0.8 GB. It measures how much its resident anonymous
memory grows (RssAnon of /proc/self/status, read every 2 ms; mapped files do not count). Each process has done the same
with a tiny model before, so that libraries and process groups do not count either. Allowed are its share of the
experts, its part of the dense parameters, and one expert.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import hecate
from benchmarks.report import Report
from hecate.values.local import local_tensor

TARGET = 1.10
"""Required upper limit, as a multiple of the allowed bytes."""


def mixtral(width: int, layers: int, experts: int) -> nn.Module:
    """The model, on the meta device."""
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def resident() -> int:
    """Bytes of anonymous memory that this process uses now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def growth(call: Callable[[], object], before: int) -> int:
    """The largest number of bytes of anonymous memory above `before` while `call` runs."""
    peak, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.append(max(peak.pop(), resident()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(peak[0], resident()) - before


def measure(folder: Path) -> dict[str, float]:
    """One process's figures, in bytes."""
    tiny = hecate.fully_shard(mixtral(64, 2, 16))
    tiny.init_weights(0)
    tiny.save_pretrained(folder / "tiny")
    tiny.load_pretrained(folder / "tiny")
    del tiny
    dist.barrier()
    before = resident()
    engines: list[hecate.FSSDP] = []
    found = {"fully_shard": growth(lambda: engines.append(hecate.fully_shard(mixtral(512, 4, 32))), before)}
    engine = engines[0]
    found["init_weights"] = growth(lambda: engine.init_weights(0), before)
    found["save_pretrained"] = growth(lambda: engine.save_pretrained(folder / "model"), before)
    found["load_pretrained"] = growth(lambda: engine.load_pretrained(folder / "model"), before)
    pools = {id(p) for pool in engine.pools for p in pool.parameters.values()}
    one_expert = sum(p[0].nbytes for pool in engine.pools for p in map(local_tensor, pool.parameters.values()))
    experts = sum(local_tensor(p).nbytes for p in engine.model.parameters() if id(p) in pools)
    dense = sum(local_tensor(p).nbytes for p in engine.model.parameters() if id(p) not in pools)
    return {"allowed": experts + dense + one_expert, **found}


def process(rank: int, world_size: int, port: int, folder: str, results: str) -> None:
    """Run one process; rank 0 reports the largest figure of all processes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    found = measure(Path(folder))
    everybody: list[dict[str, float] | None] = [None] * world_size
    dist.all_gather_object(everybody, found)
    if rank == 0:
        torch.save(everybody, results)
    dist.destroy_process_group()


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=8)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/results.pt"
        mp.spawn(process, (arguments.processes, port, folder, results), arguments.processes)
        everybody = torch.load(results)
    report = Report()
    setting = f"Mixtral of 4 layers of 32 experts of 6.3 MB, {arguments.processes} processes"
    report.add(setting, "to show", "peak over allowed", TARGET)
    report.add(setting, "allowed", "megabytes", max(found["allowed"] for found in everybody) / 1e6, "MB")
    for step in ("fully_shard", "init_weights", "save_pretrained", "load_pretrained"):
        report.add(setting, step, "megabytes", max(found[step] for found in everybody) / 1e6, "MB")
        report.add(setting, step, "peak over allowed", max(found[step] / found["allowed"] for found in everybody))
    print(report.table("megabytes"), report.table("peak over allowed"), sep="\n\n")
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
