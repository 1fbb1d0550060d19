"""One rank of one case: builds the model, shards it and trains it on the fake device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import hecate
from hecate.cost import CostModel
from hecate.models import TransformerMoE
from hecate.ops.kernels import choice
from hecate.ranks import backend
from hecate.ranks.agree import Ranks
from hecate.ranks.device import own_device
from hecate.runtime import comms, setup
from hecate.runtime.step import assemble
from hecate.runtime.tokens import dispatch, on_device
from tests.dry_run.device import FakeDevice, where
from tests.dry_run.models import MODELS
from tests.dry_run.records import Case, Launch, Message, Outcome
from tests.dry_run.routing import Routing

__all__ = ["run_rank"]

BATCH, LENGTH, STEP = 2, 256, 16
"""Every rank has sequences of another length: LENGTH less a multiple of STEP tokens."""


COST = CostModel(flops=10**12, hidden_permille=1000, message_ns=1_000, inter_node_bandwidth=2 * 10**9)
"""Slow compute: copies pay, so that they are made. Slow links between nodes: so does the node-aware dispatch with many
experts per token.
"""


def run_rank(case: Case, rank: int) -> Outcome:
    """Train two steps (of one and of two micro-batches) and evaluate once, as `rank` of `case.world`."""
    device = FakeDevice()
    on_device._pairs.cache_clear()  # fake tensors of another rank or case
    shard = case.world // case.replicas
    routing = Routing(shard, lambda r, number: BATCH * _length(rank - rank % shard + r, number))
    device.answer = routing.answer
    with _ranks(case, rank), device.running(), _seams(device), routing.answering(), _counted() as made:
        torch.cuda.init()
        torch.cuda.set_device(rank % case.per_node)
        model = MODELS[case.model](case.world)
        mesh = _mesh(case)
        engine = hecate.fully_shard(model, mesh, _config(case))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        device.strict = True
        for micro_batches in (1, 2):
            for _ in range(micro_batches):
                _forward(model, routing, rank).backward()
            engine.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            _forward(model, routing, rank)
        device.strict = False
        copies = sum(layer["copies"] for layer in engine._engine.report()["layers"])
        engine.close()
    for name, expected in (("node_dispatch", case.by_node), ("halved", case.halves)):
        assert (name in made) == expected, f"{name} was called {made.count(name)} times"
    return Outcome(tuple(device.log), tuple(device.faults), copies)


def _length(rank: int, number: int) -> int:
    return LENGTH - STEP * ((rank + number) % 3)


def _forward(model: nn.Module, routing: Routing, rank: int) -> Tensor:
    routing.passes += 1
    tokens = torch.randint(64, (BATCH, _length(rank, routing.passes)), device="cuda")
    return model(tokens, tokens).loss if isinstance(model, TransformerMoE) else model(tokens, labels=tokens).loss


def _config(case: Case) -> hecate.FSSDPConfig:
    return hecate.FSSDPConfig(
        policy=case.policy,  # type: ignore[arg-type]
        rematerialize=case.rematerialize,
        dense=case.dense,  # type: ignore[arg-type]
        kernels=case.kernels,  # type: ignore[arg-type]
        transport="messages",  # there is no symmetric memory on devices that do not exist
        memory_slots=2,
        calibrate="always" if case.splits == "host" else False,
        splits=case.splits,  # type: ignore[arg-type]
        token_halves=case.halves,
        rows_per_pair=None if case.splits == "host" else 4096,
        cost=COST,
        reshard_interval=1,
        master_dtype=torch.float32,
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
    )


def _mesh(case: Case) -> Any:
    if case.world == 1:
        return None
    if case.replicas == 1:
        return init_device_mesh("cuda", (case.world,))
    return init_device_mesh("cuda", (case.replicas, case.world // case.replicas), mesh_dim_names=("replicate", "shard"))


@contextmanager
def _ranks(case: Case, rank: int) -> Iterator[None]:
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(case.per_node)):
        if case.world == 1:
            yield
            return
        dist.init_process_group("fake", rank=rank, world_size=case.world, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _seams(device: FakeDevice) -> Iterator[None]:
    """What a process alone cannot do: hear from other ranks. And group calls, recorded as a whole."""
    batch, make_options = dist.batch_isend_irecv, comms.nccl_options

    def batch_isend_irecv(operations: Sequence[dist.P2POp]) -> list[dist.Work]:
        device.log.append(_group_call(operations))
        with device.group_call():
            return batch(list(operations))

    def gather(ranks: Ranks, value: Any) -> list[Any]:
        if ranks.group is not None:
            members = tuple(dist.get_process_group_ranks(ranks.group))
            device.log.append(Launch(ranks.group.group_name, members, "objects", where=where()))
            device.fault("host read", "objects of all ranks")
        return [value] * ranks.size

    with ExitStack() as stack:
        for target, name, new in (
            (dist, "batch_isend_irecv", batch_isend_irecv),
            (Ranks, "gather", gather),
            (comms, "timeout_of", lambda group, device_type: timedelta(minutes=10)),
            (comms, "nccl_options", lambda *args: make_options(*args) and None),  # a fake group takes none of NCCL
            (backend, "_backends", lambda group: {"cpu": "gloo", "cuda": "nccl"}),
            (setup, "settle_device", lambda kind, *rest: (own_device(kind), 1)),
            (assemble, "Heartbeat", lambda *args: None),
            (choice, "missing", lambda device: None),
            (TransformerMoE, "init_weights", lambda self, seed: None),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Gives a list of the calls that made a dispatch of a kind. A Mock would keep the tensors alive."""
    made: list[str] = []

    def counting(name: str) -> Any:
        make = getattr(dispatch, name)

        def counted(*args: Any) -> Any:
            made.append(name)
            return make(*args)

        return mock.patch.object(dispatch, name, counted)

    with counting("node_dispatch"), counting("halved"):
        yield made


def _group_call(operations: Sequence[dist.P2POp]) -> Launch:
    group = operations[0].group
    assert group is not None
    assert all(o.group is group for o in operations)
    members = tuple(dist.get_process_group_ranks(group))
    messages = tuple(Message(o.op is dist.isend, o.peer, o.tensor.nbytes) for o in operations)
    return Launch(group.group_name, members, "messages", messages=messages, where=where())
