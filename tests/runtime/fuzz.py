"""Random settings and patterns of use against the plain model, in float64.

`python -m tests.runtime.fuzz --cases 500 --seed 0` draws case after case and prints each one that fails, with the
command that repeats it: `python -m tests.runtime.fuzz --only SEED`. The seed determines everything, also the number of
devices.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import hecate
from hecate.cost import CostModel
from hecate.models.transformer import ModelConfig
from hecate.values.full import full_tensor
from tests.runtime.helpers import FREE, SLOW_NODES, close, gpt, rank, world
from tests.runtime.reference import full_gradients
from tests.workers import Group, WorkerError

COSTS = {"free": FREE, "nodes": SLOW_NODES, "default": CostModel(), "cpu": CostModel.cpu()}
STEPS = 4
FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "trunk": lambda name: not _is_expert(name),
    "experts": lambda name: _is_expert(name),
    "down": lambda name: name.endswith(("experts.down", "_down")),
    "gate": lambda name: "gate" in name,
}


@dataclass(frozen=True)
class FuzzCase:
    """One run: settings of engine, model and data, and a pattern of use per step.

    Attributes:
        seed: the seed that it was drawn from.
        devices: number of devices.
        settings: fields of `FSSDPConfig`; `cost` is a name in `COSTS`.
        model: fields of `ModelConfig`.
        mesh: (replicas, devices that share experts), or None.
        per_node: devices per node.
        batch, length: number of sequences, and tokens per sequence, by rank.
        accumulate: micro-batches per step.
        optimizer: see `_optimizers`.
        keep_zeros: gradients are set to zero rather than None.
        frozen: for each step, a name in `FROZEN`.
        order: for each step, how forward and backward passes alternate, see `ORDERS`.
        before: for each step, what happens before its passes, see `EVENTS`.
    """

    seed: int
    devices: int
    settings: dict[str, Any]
    model: dict[str, Any]
    mesh: tuple[int, int] | None
    per_node: int
    batch: tuple[int, ...]
    length: tuple[int, ...]
    accumulate: int
    optimizer: str
    keep_zeros: bool
    frozen: tuple[str, ...]
    order: tuple[str, ...]
    before: tuple[str, ...]

    @classmethod
    def draw(cls, seed: int, devices: int | None = None) -> FuzzCase:
        draw = random.Random(seed)
        devices = draw.choice((1, 2, 2, 2, 3, 4)) if devices is None else devices
        settings, model = _draw_settings(draw), _draw_model(draw)
        meshes: list[tuple[int, int] | None] = [None, None, (1, devices)]
        meshes += [(n, devices // n) for n in (2, 3, 4) if devices % n == 0]
        phases = draw.choice([("nothing",)] * 3 + [("trunk",), ("experts", "nothing"), tuple(FROZEN)])
        orders = [o for o in ORDERS if o != "joint" or not model["use_reentrant"]]
        return cls(
            seed=seed,
            devices=devices,
            settings=settings,
            model=model,
            mesh=draw.choice(meshes),
            per_node=draw.choice([n for n in (1, 2, devices) if devices % n == 0]),
            batch=tuple(draw.choice((0, 1, 1, 2, 3)) for _ in range(devices)),
            length=tuple(draw.choice((1, 3, 8, 8)) for _ in range(devices)),
            accumulate=draw.choice((1, 1, 2, 3)),
            optimizer=draw.choice(("adamw", "foreach", "fused", "sgd", "two", "by hand")),
            keep_zeros=draw.random() < 0.3,
            frozen=tuple(draw.choice(phases) for _ in range(STEPS)),
            order=tuple(draw.choice(orders) for _ in range(STEPS)),
            before=tuple(draw.choice(["nothing"] * 3 + list(EVENTS)) for _ in range(STEPS)),
        )

    def describe(self) -> str:
        return "\n".join(f"    {f.name}: {getattr(self, f.name)}" for f in fields(self))


def _draw_settings(draw: random.Random) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "policy": draw.choice(("ep", "hecate", "balanced", "balanced", "balanced")),
        "overlap_degree": draw.choice(("auto", 0, 1, 2, 4, 8)),
        "memory_slots": draw.choice(("auto", 0, 1, 2, 3, 5)),
        "calibrate": draw.choice(("pays", "always", "always", False)),
        "rematerialize": draw.random() < 0.5,
        "reshard_interval": draw.choice((0, 1, 1, 2)),
        "load_window": draw.choice((1, 2, 5)),
        "max_imbalance": draw.choice((1.0, 1.02, 1.3)),
        "pools": draw.choice(("shared", "layer")),
        "dense": draw.choice(("fsdp", "fsdp", "replicate")),
        "cost": draw.choice(("free", "free", "free", "nodes", "default", "cpu")),
    }
    if chosen["policy"] == "hecate" and chosen["overlap_degree"] == "auto":
        chosen["overlap_degree"] = 3
    return chosen


def _draw_model(draw: random.Random) -> dict[str, Any]:
    experts = draw.choice((1, 2, 3, 4, 5, 7, 8))
    return {
        "num_experts": experts,
        "top_k": min(experts, draw.choice((1, 2, 2, 3))),
        "num_layers": draw.choice((1, 2, 3)),
        "checkpoint": draw.random() < 0.4,
        "use_reentrant": draw.random() < 0.3,
    }


def _is_expert(name: str) -> bool:
    return ".experts." in name or name.startswith("hecate_pool_")


class Run:
    """Both models of a case; each method does the same to the plain model and to the one under FSSDP."""

    def __init__(self, case: FuzzCase, folder: str) -> None:
        self.case, self.folder = case, folder
        sizes = {"vocab_size": 17, "max_length": 8, "d_model": 8, "num_heads": 2, "aux_weight": 0.1}
        self.plain = gpt(ModelConfig(**(sizes | case.model)), seed=case.seed % 5)
        self.model = copy.deepcopy(self.plain)
        mesh = None if case.mesh is None else init_device_mesh("cpu", case.mesh, mesh_dim_names=("replicate", "shard"))
        config = hecate.FSSDPConfig(**(case.settings | {"cost": COSTS[case.settings["cost"]]}))
        self.engine = hecate.fully_shard(self.model, mesh, config)
        self.optimizers = [_optimizers(case.optimizer, model) for model in self.both]
        self.step = 0

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.model, self.plain

    def batch(self, number: int, of: int) -> tuple[Tensor, Tensor]:
        """A micro-batch of one rank; the batch sizes rotate over the ranks."""
        case = self.case
        shape = case.batch[(of + self.step) % case.devices], case.length[of] + 1
        generator = torch.Generator().manual_seed(case.seed * 7919 + 1000 * self.step + 10 * of + number)
        tokens = torch.randint(17, shape, generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, number: int) -> Tensor:
        return self.model(*self.batch(number, rank())).loss

    def backward_plain(self, number: int) -> None:
        for of in range(world()):
            loss = self.plain(*self.batch(number, of)).loss
            if loss.requires_grad:
                (loss / world()).backward()

    def train(self) -> None:
        case = self.case
        EVENTS[case.before[self.step]](self)
        for model in self.both:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not FROZEN[case.frozen[self.step]](name))
        ORDERS[case.order[self.step]](self)
        for number in range(case.accumulate):
            self.backward_plain(number)
        self._check_gradients()
        self._update()
        state = self.engine.full_state_dict()
        for name, value in self.plain.state_dict().items():
            close(f"step {self.step}: {name}", state[name], value, 1e-8)
        self.step += 1

    def _check_gradients(self) -> None:
        gradients = full_gradients(self.engine)
        for name, p in self.plain.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            close(f"step {self.step}: gradient of {name}", gradients[name], expected, 1e-8)

    def _update(self) -> None:
        norm = full_tensor(self.engine.clip_grad_norm_(0.3))
        close(f"step {self.step}: norm", norm, nn.utils.clip_grad_norm_(self.plain.parameters(), 0.3), 1e-8)
        for model, optimizers in zip(self.both, self.optimizers, strict=True):
            if not optimizers:
                _step_by_hand(model)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=not self.case.keep_zeros)


def _optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    if name == "by hand":
        return []
    if name == "sgd":
        return [torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)]
    if name == "two":
        groups = [[p for n, p in model.named_parameters() if _is_expert(n) is experts] for experts in (True, False)]
        return [torch.optim.AdamW(group, lr=1e-3, eps=1e-6) for group in groups]
    options = {"foreach": {"foreach": True}, "fused": {"fused": True}}.get(name, {})
    return [torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, eps=1e-6, **options)]


@torch.no_grad()
def _step_by_hand(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.requires_grad:
            parameter.sub_(parameter.grad, alpha=0.05)
        parameter.grad = None


# How forward and backward passes of a step alternate.


def _one_by_one(run: Run, no_sync: bool = False, between: Callable[[Run], None] | None = None) -> None:
    last = run.case.accumulate - 1
    for number in range(run.case.accumulate):
        with run.engine.no_sync() if no_sync and number < last else nullcontext():
            loss = run.loss(number)
            if between is not None:
                between(run)
            _backward(loss)


def _in_flight(run: Run, reverse: bool) -> None:
    losses = [run.loss(number) for number in range(run.case.accumulate)]
    for loss in reversed(losses) if reverse else losses:
        _backward(loss)


def _joint(run: Run) -> None:
    _backward(torch.stack([run.loss(number) for number in range(run.case.accumulate)]).sum())


def _retained(run: Run) -> None:
    """Two backward passes per graph, each for half of the gradient."""
    for number in range(run.case.accumulate):
        loss = run.loss(number) / 2
        if loss.requires_grad:
            loss.backward(retain_graph=True)
            loss.backward()


def _dropped(run: Run) -> None:
    """Before each pass, another forward pass whose loss is not used."""
    for number in range(run.case.accumulate):
        kept = run.loss(100 + number)
        _backward(run.loss(number))
        del kept


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()


def _evaluate(run: Run) -> None:
    """A forward pass without gradients; its loss must equal the plain model's."""
    with torch.no_grad():
        ours, plain = (model(*run.batch(200, rank())).logits for model in run.both)
    close(f"step {run.step}: evaluation", ours, plain, 1e-8)


ORDERS: dict[str, Callable[[Run], None]] = {
    "one by one": _one_by_one,
    "no_sync": lambda run: _one_by_one(run, no_sync=True),
    "evaluation between": lambda run: _one_by_one(run, between=_evaluate),
    "in flight": lambda run: _in_flight(run, reverse=False),
    "in flight, reverse": lambda run: _in_flight(run, reverse=True),
    "joint": _joint,
    "retained": _retained,
    "dropped": _dropped,
}


# What happens between steps.


def _drop(run: Run) -> None:
    """A forward pass with gradients enabled whose output is not used."""
    run.loss(300)


def _edit(run: Run) -> None:
    """Change weights under no_grad, as adding noise or averaging does."""
    with torch.no_grad():
        for model in run.both:
            for parameter in model.parameters():
                parameter.mul_(1.01)


def _save_and_load(run: Run) -> None:
    """Save a checkpoint, change the model, and load the checkpoint into the same engine."""
    path = str(Path(run.folder) / f"step-{run.step}")
    optimizers = run.optimizers[0]
    optimizer = optimizers[0] if len(optimizers) == 1 else None
    run.engine.save(path, optimizer)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(2.0)
    run.engine.load(path, optimizer)
    for parameter in run.plain.parameters():  # `load` drops gradients; zeros would let a frozen weight decay
        parameter.grad = None


def _snapshot(run: Run) -> None:
    """Keep a state dict, and load it again after a change."""
    kept = copy.deepcopy(run.model.state_dict())
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(2.0)
    run.model.load_state_dict(kept)


def _skip(run: Run) -> None:
    """A step whose gradients are dropped."""
    _backward(run.loss(400))
    run.engine.skip_step()
    for parameter in run.plain.parameters():
        parameter.grad = None


EVENTS: dict[str, Callable[[Run], None]] = {
    "nothing": lambda run: None,
    "evaluation": _evaluate,
    "dropped pass": _drop,
    "weights edited": _edit,
    "save and load": _save_and_load,
    "snapshot": _snapshot,
    "step skipped": _skip,
}


@contextmanager
def _node_of(devices: int) -> Iterator[None]:
    os.environ["LOCAL_WORLD_SIZE"] = str(devices)
    try:
        yield
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def run_case(case: FuzzCase, folder: str) -> None:
    """Run a case on every rank of a group of `case.devices`; AssertionError says what differs."""
    warnings.filterwarnings("ignore")
    with _node_of(case.per_node):
        run = Run(case, folder)
        for _ in range(STEPS):
            run.train()
    run.engine.close()


def run_cases(cases: list[FuzzCase], folder: str) -> list[str]:
    """Run several cases in one call; returns the error texts of those that failed on this rank."""
    failed = []
    for case in cases:
        try:
            run_case(case, str(Path(folder) / str(case.seed)))
        except AssertionError as error:
            failed.append(report(case, str(error)))
        dist.barrier()
    return failed


def report(case: FuzzCase, error: str) -> str:
    return f"seed {case.seed}: {error}\n{case.describe()}\n    python -m tests.runtime.fuzz --only {case.seed}"


class Pool:
    """Worker groups by world size, `jobs` of them at a time."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._idle: dict[int, Queue[Group]] = {n: Queue() for n in range(1, 5)}

    def run(self, case: FuzzCase) -> str:
        """The error text; empty if the case passed."""
        idle = self._idle[case.devices]
        group = idle.get() if not idle.empty() else Group(case.devices)
        try:
            group.run(run_case, case, str(Path(self._folder) / str(case.seed)))
        except WorkerError as error:
            group.close()
            return report(case, str(error))
        idle.put(group)
        return ""

    def close(self) -> None:
        for idle in self._idle.values():
            while not idle.empty():
                idle.get().close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--only", type=int, help="this seed alone")
    parser.add_argument("--jobs", type=int, default=1, help="groups at a time")
    options = parser.parse_args()
    seeds = [options.only] if options.only is not None else list(range(options.seed, options.seed + options.cases))
    failed = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as threads:
        pool = Pool(folder)
        for number, error in enumerate(threads.map(pool.run, map(FuzzCase.draw, seeds)), 1):
            if error:
                failed.append(seeds[number - 1])
                print(error, flush=True)
            if number % 25 == 0 or number == len(seeds):
                print(
                    f"{number} of {len(seeds)} cases, seeds {seeds[0]} to {seeds[number - 1]}; failed: {failed}",
                    flush=True,
                )
        pool.close()
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
