"""`torchrun ... -m hecate.sim.measure out=FILE [key=value ...]`: a profile of the machine that it runs on.

The profile holds a cluster for the simulator (`cluster=FILE`) and the cost model for training (`fssdp.cost=FILE`), and
what was measured. On CUDA, copies are timed as NCCL does them beside compute; on the CPU over gloo.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.checkpoint.folder import replace_file
from hecate.models.moe import Experts
from hecate.models.transformer import Attention
from hecate.ops.grouped import Groups
from hecate.placement import Topology
from hecate.ranks.join import join
from hecate.ranks.messages import all_gather_into
from hecate.sim.beside import Work, work_of_messages
from hecate.sim.clock import SECOND, Clock, fit, rate
from hecate.sim.cluster import Cluster
from hecate.sim.files import check_writable
from hecate.sim.links import measure_links

__all__ = ["DEFAULTS", "main", "profile"]

DEFAULTS: Mapping[str, Any] = {
    "out": None,
    "name": "measured",
    "width": 256,  # of a token, in the measured products
    "tokens": 1024,
    "megabytes": 4,  # of a large message
    "repeats": 9,
    "dtype": "float32",
    "device_memory": 0,  # bytes; 0: the GPU's, or the machine's divided by its ranks
}


def main() -> None:
    """Read the command line, join torchrun's processes, measure, write the profile on rank 0."""
    device = join()
    try:
        settings = _settings(sys.argv[1:])
        if not dist.is_initialized() or dist.get_world_size() < 2:
            raise ValueError("hecate.sim.measure needs at least 2 processes: run it under torchrun")
    except ValueError as error:
        sys.exit(f"error: {error}")
    found = profile(device, settings)
    if dist.get_rank() == 0:
        replace_file(Path(settings["out"]), json.dumps(found, indent=1) + "\n")
        print(f"wrote {settings['out']}")
    dist.destroy_process_group()


def _settings(words: Sequence[str]) -> dict[str, Any]:
    settings = dict(DEFAULTS)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in DEFAULTS:
            raise ValueError(f"{word!r}: must be key=value, with a key of {', '.join(DEFAULTS)}")
        settings[key] = int(value) if isinstance(DEFAULTS[key], int) else value
    if settings["out"] is None:
        raise ValueError("out=FILE is missing")
    check_writable("out", Path(settings["out"]))
    if settings["dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={settings['dtype']}: must be float32 or bfloat16")
    return settings


def profile(device: torch.device, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measure everything. Collective.

    Args:
        device: this rank's.
        settings: as `DEFAULTS`, except `out`.

    Returns:
        `{"cluster": ..., "cost": ..., "measured": ...}`, the same on all ranks.
    """
    topology = Topology.detect(dist.get_world_size())
    clock = Clock(device, settings["repeats"])
    links = measure_links(clock, topology, settings["megabytes"] * 10**6)
    dtype = getattr(torch, settings["dtype"])
    experts = _experts(clock, settings["width"], settings["tokens"], dtype)
    dense = _dense(clock, settings["width"], settings["tokens"], dtype)
    packing = _packing(clock, settings["width"], settings["tokens"], dtype)
    size = settings["megabytes"] * 10**6
    if device.type == "cpu":
        slowdown, work = 0, work_of_messages(topology, settings["width"], size, settings["repeats"])
    else:  # engines beside the SMs move bytes
        slowdown, work = _slowdown(clock, topology, settings["width"], size, dtype), Work(0, 0, 0, [])
    cluster = Cluster(
        name=settings["name"],
        devices=topology.num_devices,
        devices_per_node=topology.devices_per_node,
        **links.fitted,
        **experts["fitted"],
        **dense["fitted"],
        plan_ns=150_000,
        memory_bandwidth=packing,
        slowdown_permille=slowdown,
        copies_ns=0,
        message_work_ns=work.message_ns,
        inside_work_ps=work.inside_ps,
        across_work_ps=work.across_ps,
        hidden_permille=0 if device.type == "cpu" else min(800, 1000 - slowdown),
        device_memory=settings["device_memory"] or _memory(device, topology.devices_per_node),
        fixed_memory=0,
        on_cpu=device.type == "cpu",
    )
    return {
        "cluster": asdict(cluster),
        "cost": asdict(cluster.cost),
        "measured": {
            "experts": experts["points"],
            "dense": dense["points"],
            "messages": work.points,
            "links": links.times,
            "settings": dict(settings),
            "torch": metadata.version("torch"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        },
    }


def _experts(clock: Clock, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward of expert MLPs of two widths, with few and many rows; a third of it is a pass."""
    points, rows, times = [], [], []
    for d in (width // 2, width):
        for groups in (2, 8):
            experts = Experts(groups, d, 2 * d).to(clock.device, dtype)
            for parameter in experts.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            weights = {kind: getattr(experts, kind) for kind in experts.expert_weights}
            for each in (1, 8, max(16, tokens // 16), max(32, tokens // 4)):
                x = torch.randn(groups * each, d, device=clock.device, dtype=dtype, requires_grad=True)
                sizes = Groups.of([each] * groups, clock.device)

                def run(x: Tensor = x, sizes: Groups = sizes, weights: Mapping[str, Tensor] = weights) -> None:
                    Experts.expert_mlp(x, sizes, weights).sum().backward()

                ns = clock(run) // 3
                per_row = 2 * 4 * d * d
                points.append({"width": d, "experts": groups, "rows": groups * each, "ns": ns})
                rows.append([groups * each * per_row, groups * per_row, groups, 1])
                times.append(ns)
    per_flop, per_weight, per_expert, fixed = fit(rows, times)
    return {
        "points": points,
        "fitted": {
            "flops": int(SECOND / per_flop),
            "half_rows": int(per_weight / per_flop),
            "expert_ns": int(per_expert),
            "call_ns": int(fixed),
        },
    }


def _dense(clock: Clock, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward of attention over sequences of 64 tokens; a third of it is a pass."""
    points, rows, times = [], [], []
    for d in (width // 2, width):
        attention = Attention(d, max(1, d // 64), causal=True).to(clock.device, dtype)
        for count in (64, max(128, tokens // 2), max(256, tokens)):
            x = torch.randn(count // 64, 64, d, device=clock.device, dtype=dtype, requires_grad=True)
            ns = clock(lambda x=x, attention=attention: attention(x).sum().backward()) // 3  # type: ignore[misc]
            points.append({"width": d, "tokens": count, "ns": ns})
            rows.append([count * (2 * 4 * d * d + 2 * 64 * d), 1])
            times.append(ns)
    per_flop, fixed = fit(rows, times)
    return {"points": points, "fitted": {"dense_flops": int(SECOND / per_flop), "layer_ns": int(fixed)}}


def _packing(clock: Clock, width: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes per second, read and written, of putting rows in another order."""
    rows = torch.randn(max(tokens, 4096), width, device=clock.device).to(dtype)
    order = torch.randperm(len(rows), device=clock.device)
    return rate(2 * rows.numel() * rows.element_size(), clock(lambda: rows.index_select(0, order)))


def _slowdown(clock: Clock, topology: Topology, width: int, size: int, dtype: torch.dtype) -> int:
    """By which share of its own time, in 1/1000, an all-gather beside matrix products delays these."""
    part = torch.zeros(size // topology.num_devices, dtype=torch.uint8, device=clock.device)
    table = torch.zeros(part.numel() * topology.num_devices, dtype=torch.uint8, device=clock.device)
    a = torch.randn(4 * width, 4 * width, device=clock.device, dtype=dtype)

    def compute(number: int) -> None:
        for _ in range(number):
            a @ a

    traffic = clock(lambda: all_gather_into(table, part))
    once = clock(lambda: compute(1))
    number = max(1, 2 * traffic // max(1, once))

    def both() -> None:
        wait = all_gather_into(table, part, async_op=True)
        compute(number)
        wait()

    delay = clock(both) - clock(lambda: compute(number))
    return min(1000, max(0, 1000 * delay // max(1, traffic)))


def _memory(device: torch.device, per_node: int) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    with open("/proc/meminfo") as lines:
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    return total // per_node


if __name__ == "__main__":
    main()
