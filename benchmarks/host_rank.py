"""One process of `benchmarks.host`: times one rank's host work in one MoE layer; its process group sends nothing.

Runs on the checkout that PYTHONPATH names, and finds the parts by names that all compared commits have.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from time import thread_time_ns
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode

import hecate
from hecate.collectives.transport import Transport, Work
from hecate.cost import CostModel
from hecate.models.moe import Experts
from hecate.policies.balanced import Balanced
from hecate.runtime import comms
from hecate.runtime.plans.ahead import PlanAhead
from hecate.runtime.plans.layer import LayerPlans
from hecate.runtime.step.layer import FSSDPExperts
from hecate.runtime.step.passes import Passes
from hecate.runtime.tokens import dispatch

PER_NODE = 8
TOP_K = 2
TOKENS = 128  # of a device; few, so that the sort and the permutations cost little more than their call
WIDTH = 8
RANK = 3
WARM_UP = 3
REPEATS = 7  # of each pass; the shortest counts
CALLS = 200  # of an op or function whose cost is measured
FAST = CostModel(hidden_permille=800)

BACKEND = fake_pg.__name__ and "fake"  # importing the module registers the backend

Times = dict[str, list[int]]


class Clock:
    """Nanoseconds that this thread has run, without the calls of the clock itself."""

    def __init__(self) -> None:
        times = [thread_time_ns() for _ in range(1000)]
        self._price = (times[-1] - times[0]) // (len(times) - 1)
        self._calls = 0

    def now(self) -> int:
        self._calls += 1
        return thread_time_ns() - self._calls * self._price


class Model(nn.Module):
    """One MoE layer with a given choice of experts; the dense part is one vector."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.experts = Experts(experts, WIDTH, WIDTH)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """`[T, d]`, `[T, k]`, `[T, k]` to `[T, d]`."""
        return self.experts(hidden * self.scale, index, weights)


class NoTransport(Transport):
    """Sends no experts and no gradients."""

    def gather(self, *_: object) -> Work:
        return Work(lambda: None)

    def reduce(self, *_: object) -> Work:
        return Work(lambda: None)


class Done:
    """A handle of communication that has ended."""

    def __init__(self, at_wait: Callable[[], None]) -> None:
        self._at_wait = at_wait

    def wait(self) -> bool:
        self._at_wait()
        return True


class Watch:
    """Replaces the collectives of a layer by ones that only fill in what other ranks would send, and notes times."""

    def __init__(self) -> None:
        self.times: Times = defaultdict(list)
        self.counts = torch.empty(0, dtype=torch.int64)
        self.began = self.known = 0
        self.clock = Clock()
        weigh = "weigh" if hasattr(Balanced, "weigh") else "calibrate"  # the latter in old commits
        for owner, name, part in (
            (Balanced, weigh, "calibrate"),
            (Balanced, "assign", "assign"),
            (LayerPlans, "book", "book"),
            (FSSDPExperts, "forward", "forward"),
            (dispatch, "node_exchange_pays", "exchange choice"),
            (dispatch, "direct_dispatch", "dispatch record"),
        ):
            setattr(owner, name, self.timed(getattr(owner, name), part))
        replaced: tuple[tuple[object, str, Callable[..., Any]], ...] = (
            (comms, "timeout_of", lambda *_: timedelta(minutes=1)),  # a group of the backend "fake" has no timeout
            (comms, "transport_of", lambda group, _, topology, links: NoTransport(group, topology)),
            (Passes, "record", self._begins(Passes.record)),
            (dist, "all_gather", self._all_gather),
            (dist, "all_gather_into_tensor", self._all_gather_into_tensor),
            (dist, "all_gather_single", self._all_gather_into_tensor),  # its name since torch 2.13
            (dist, "all_to_all_single", self._all_to_all),
        )
        for module, name, call in replaced:
            setattr(module, name, call)
        if inspection := sys.modules.get("hecate.runtime.setup"):  # waits for other ranks; not in old commits
            vars(inspection)["settle_device"] = lambda *_: (torch.device("cpu"), 1)

    def routed(self, devices: int, experts: int, step: int) -> Tensor:
        """Draw the experts of all devices' tokens from a Zipf law whose loads drift from step to step.

        Returns those of this rank's, `[TOKENS, TOP_K]`.
        """
        rng = np.random.default_rng([devices, experts, step])
        loads = 1 / (1 + np.random.default_rng(0).permutation(experts)) * rng.uniform(0.9, 1.1, experts)
        keys = rng.exponential(size=(devices, TOKENS, experts)) / loads
        picks = np.argpartition(keys, TOP_K, axis=2)[:, :, :TOP_K]
        rows = [np.bincount(of_device.ravel(), minlength=experts) for of_device in picks]
        self.counts = torch.from_numpy(np.stack(rows).astype(np.int64))
        return torch.from_numpy(picks[RANK].copy())

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = self.clock.now()
            result = call(*args, **options)
            self.times[part].append(self.clock.now() - start)
            return result

        return timed

    def _begins(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def begins(*args: Any, **options: Any) -> Any:
            self.began, self.known = self.clock.now(), 0
            return call(*args, **options)

        return begins

    def _know(self) -> None:
        self.known = self.clock.now()

    def _fill(self, table: Tensor, row: Tensor) -> None:
        experts = self.counts.shape[1]
        table.copy_(row.expand_as(table))
        table[:, :experts] = self.counts

    def _all_gather(self, tensors: list[Tensor], row: Tensor, group: object = None) -> None:
        base = tensors[0]._base
        assert base is not None
        self._fill(base, row)
        self._know()

    def _all_gather_into_tensor(
        self, table: Tensor, row: Tensor, group: object = None, async_op: bool = False
    ) -> Done | None:
        self._fill(table.view(-1, row.numel()), row)
        self._know()
        return Done(self._know) if async_op else None

    def _all_to_all(
        self, out: Tensor, rows: Tensor, *sizes: object, group: object = None, async_op: bool = False
    ) -> Done | None:
        if self.known and rows.is_floating_point():
            now = self.clock.now()
            self.times["bubble"].append(now - self.known)
            self.times["gate to all-to-all"].append(now - self.began)
            self.known = 0
        out.zero_()
        return Done(lambda: None) if async_op else None


class Calls(TorchDispatchMode):
    """Counts calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.namespace == "hecate"
        return func(*args, **(kwargs or {}))


class Nothing(torch.autograd.Function):
    """A function that does nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def idle_op() -> Callable[..., Any]:
    """An op without work, registered as this package registers its own."""
    try:
        from hecate.ops.registry import register
    except ImportError:  # before there was a registry
        return torch.library.custom_op("hecate::idle", lambda x: None, mutates_args=(), schema="(Tensor x) -> ()")
    return register("idle(Tensor x) -> ()", lambda x: None, lambda x: None)


class Overhead:
    """What calls of ops and autograd functions cost by themselves, in nanoseconds: the least of some runs of many."""

    def __init__(self, clock: Clock) -> None:
        self._clock, x = clock, torch.ones(1, requires_grad=True)
        op, last = idle_op(), x
        self.op = self._each(lambda: op(x))
        self.apply = self._each(lambda: Nothing.apply(x))
        for _ in range(CALLS):
            last = Nothing.apply(last)
        self.backward = min(self._time(lambda: last.backward(retain_graph=True)) for _ in range(REPEATS)) / CALLS

    def of(self, model: Model, index: Tensor) -> dict[str, int]:
        """Of one layer, forward and backward."""
        with Calls() as forward:
            output = _one_pass(model, index)
        functions = _functions(output)
        with Calls() as backward:
            output.backward()
        return {
            "op overhead, forward": round(forward.number * self.op + functions * self.apply),
            "op overhead, backward": round(backward.number * self.op + functions * self.backward),
        }

    def _each(self, call: Callable[[], Any]) -> float:
        return min(self._time(lambda: [call() for _ in range(CALLS)]) for _ in range(REPEATS)) / CALLS

    def _time(self, call: Callable[[], Any]) -> int:
        start = self._clock.now()
        call()
        return self._clock.now() - start


def _functions(output: Tensor) -> int:
    """How many autograd functions written in Python are in the graph of `output`."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return sum(isinstance(node, BackwardCFunction) for node in seen)


def measure(watch: Watch, overhead: Overhead, devices: int, experts: int, passes: int) -> dict[str, float]:
    """Median nanoseconds of each part."""
    os.environ["LOCAL_WORLD_SIZE"] = str(PER_NODE)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the heartbeat writes to it
    dist.init_process_group("fake", store=store, rank=RANK, world_size=devices)
    config = hecate.FSSDPConfig(
        policy="balanced", overlap_degree=2, memory_slots=2, cost=FAST, dense="none", calibrate="pays"
    )
    torch.manual_seed(0)
    model = Model(experts)
    engine = hecate.fully_shard(model, None, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(WARM_UP):  # then there is a history, and copies are planned from it
        _one_pass(model, watch.routed(devices, experts, step)).backward()
        optimizer.step()
    _one_pass(model, watch.routed(devices, experts, WARM_UP))
    least: Times = defaultdict(list)
    with patch.object(PlanAhead, "start"):  # its threads would take turns with this one
        for step in range(WARM_UP, WARM_UP + passes):
            index = watch.routed(devices, experts, step)
            watch.times.clear()
            for _ in range(REPEATS):
                watch.timed(_one_pass(model, index).backward, "backward")()
            for part, times in watch.times.items():
                least[part].append(min(times))
            for part, time in overhead.of(model, index).items():
                least[part].append(time)
    engine.close()
    dist.destroy_process_group()
    return {part: float(median(times)) for part, times in least.items()}


def _one_pass(model: Model, index: Tensor) -> Tensor:
    hidden = torch.ones(TOKENS, WIDTH, requires_grad=True)
    return model(hidden, index, torch.full(index.shape, 1.0 / TOP_K, requires_grad=True)).sum()


def main() -> None:
    """Arguments: number of passes, then settings DEVICESxEXPERTS. Prints a JSON object: setting -> part -> ns."""
    torch.set_num_threads(1)
    watch = Watch()
    overhead = Overhead(watch.clock)
    found = {}
    for setting in sys.argv[2:]:
        devices, experts = map(int, setting.split("x"))
        found[setting] = measure(watch, overhead, devices, experts, int(sys.argv[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
