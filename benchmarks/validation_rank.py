"""One rank of `benchmarks.validation`: measures a profile, then steps and memory of all cases; rank 0 writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import hecate
from benchmarks.cluster import take_share
from benchmarks.skews import Router, parse_skew
from benchmarks.steady import steady
from hecate.cost import CostModel
from hecate.models import GPTMoE, ModelConfig, TopKGate
from hecate.ranks.join import join
from hecate.sim.measure import DEFAULTS, profile

__all__ = ["CALIBRATION", "POLICIES", "SHAPES", "SKEWS", "WITH_COPIES", "config_of"]

SHAPES: Mapping[str, Mapping[str, int]] = {
    "narrow": {"d_model": 96, "num_layers": 2, "num_heads": 4, "num_experts": 8, "batch": 4, "length": 128},
    "wide": {"d_model": 192, "num_layers": 3, "num_heads": 4, "num_experts": 16, "batch": 3, "length": 128},
}
PROFILED = {**DEFAULTS, "width": 192, "tokens": 512, "megabytes": 1}
"""How the profile is measured."""
SKEWS = {"even": "none", "zipf 0.6": "zipf:0.6", "zipf 1.2": "zipf:1.2"}
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "ep": {"policy": "ep"},
    "hecate": {"policy": "hecate", "memory_slots": 2, "overlap_degree": 2},
    "balanced": {"policy": "balanced", "memory_slots": 2},
    "balanced, ahead": {"policy": "balanced", "memory_slots": 2, "overlap_degree": 2, "calibrate": False},
    "balanced, RM": {"policy": "balanced", "memory_slots": 2, "overlap_degree": 2, "rematerialize": True},
    "fastermoe": {"policy": "fastermoe", "memory_slots": 2},
    "exact": {"policy": "exact", "memory_slots": 2},
}
CALIBRATION = ("narrow", "even", "ep")
"""The case from which the time of a layer that no single measurement shows is taken; all others use it unchanged."""
WITH_COPIES = ("narrow", "even", "balanced, ahead")
"""The case from which the host time of a layer's copies is taken; all others use it unchanged."""


def config_of(shape: str) -> ModelConfig:
    """The model of a shape."""
    values = SHAPES[shape]
    return ModelConfig(
        vocab_size=256,
        d_model=values["d_model"],
        num_layers=values["num_layers"],
        num_heads=values["num_heads"],
        num_experts=values["num_experts"],
        top_k=2,
        max_length=values["length"],
    )


class _Case:
    """One model under one policy, with a router that follows one law."""

    def __init__(self, shape: str, skew: str, policy: str, cost: CostModel) -> None:
        self.shape, self.skew, self.policy = shape, skew, policy
        torch.manual_seed(0)
        model = GPTMoE(config_of(shape))
        changes: dict[str, Any] = {"reshard_interval": 0, "cost": cost, **POLICIES[policy]}
        self.engine = hecate.fully_shard(model, config=hecate.FSSDPConfig(**changes))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.seconds: list[float] = []
        self.yardstick: list[float] = []  # of the same rounds
        self.processor: list[float] = []  # seconds of all threads of this process
        self.exposed: list[Mapping[str, float]] = []
        self.counts: list[list[np.ndarray]] = []
        self.router = Router((m for m in model.modules() if isinstance(m, TopKGate)), dist.get_rank())
        self.router.skew = parse_skew(SKEWS[skew])

    def step(self, keep: bool) -> None:
        values = SHAPES[self.shape]
        tokens = torch.randint(256, (values["batch"], values["length"] + 1))
        self.router.step = len(self.counts)
        dist.barrier()
        begin, used = time.perf_counter(), time.process_time()
        self.engine.model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        self.engine.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = torch.tensor([time.perf_counter() - begin])
        used = time.process_time() - used
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        stats = self.engine.stats()
        self.counts.append([layer["counts"] for layer in stats["layers"]])
        if keep:
            self.seconds.append(float(seconds))
            self.processor.append(used)
            self.exposed.append(stats["exposed"])

    def result(self) -> dict[str, Any]:
        memory = self.engine.stats()["memory_bytes"]
        verbs = {verb: median(step.get(verb, 0.0) for step in self.exposed) for verb in ("gather", "reduce", "plan")}
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (memory, verbs, median(self.processor)))
        return {
            "shape": self.shape,
            "skew": self.skew,
            "policy": self.policy,
            "seconds": list(self.seconds),
            "yardstick": list(self.yardstick),
            "counts": [[layer.tolist() for layer in step] for step in self.counts],
            "memory": {kind: max(rank[kind] for rank, _, _ in every) for kind in memory},
            "exposed": {verb: mean(rank[verb] for _, rank, _ in every) for verb in verbs},
            "processor": mean(used for _, _, used in every),
        }


def _groups(settings: Mapping[str, Any]) -> list[list[tuple[str, str, str]]]:
    """Shape, skew and policy of all cases, those of one shape and skew together; the calibrations come first."""
    wanted = product(settings["shapes"], settings["skews"], settings["policies"])
    groups: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for names in dict.fromkeys((CALIBRATION, WITH_COPIES, *wanted)):
        groups.setdefault(names[:2], []).append(names)
    return list(groups.values())


def main() -> None:
    """Measure and train as the settings (a JSON argument) say.

    The cases of a shape and skew take steps in turn, so that whatever slows the machine down for a while slows them all
    down; another one begins each round. No further ones are there meanwhile: the heartbeats of twenty engines take
    a tenth of a core. Over the minutes that all groups take, the machine's speed changes too. So the first case, the
    yardstick, takes steps in all groups.
    """
    settings = json.loads(sys.argv[1])
    take_share()
    device = join()
    torch.set_num_threads(1)
    steady()
    found = profile(device, {**PROFILED, "repeats": settings["repeats"]})
    cost = CostModel(**found["cost"])
    if dist.get_rank() == 0:
        Path(settings["profile"]).write_text(json.dumps(found, indent=1))
    yardstick, results = _Case(*CALIBRATION, cost), []
    for group in _groups(settings):
        cases = [yardstick if names == CALIBRATION else _Case(*names, cost) for names in group]
        _take_turns(list(dict.fromkeys([yardstick, *cases])), settings["warm_up"], settings["rounds"], yardstick)
        for case in cases:
            results.append(case.result())
            if case is not yardstick:
                case.engine.close()
        if dist.get_rank() == 0:
            Path(settings["out"]).write_text(json.dumps(results))
    yardstick.engine.close()
    dist.destroy_process_group()


def _take_turns(cases: Sequence[_Case], warm_up: int, rounds: int, yardstick: _Case) -> None:
    """Steps of all cases in turn; each case keeps the times of `rounds` steps, and the yardstick's beside them."""
    for i in range(warm_up + rounds):
        for turn in range(len(cases)):
            cases[(i + turn) % len(cases)].step(keep=i >= warm_up)
    for case in cases:
        case.yardstick = yardstick.seconds[-rounds:]


if __name__ == "__main__":
    main()
