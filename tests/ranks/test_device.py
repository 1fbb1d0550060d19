"""Which device a process trains on, with a stand-in for `torch.cuda`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hecate.ranks.backend import small_tensor_device
from hecate.ranks.device import own_device, settle_device
from hecate.runtime import setup


class Machine:
    """`torch.cuda` of a process that sees `count` GPUs."""

    def __init__(self, count: int, chosen: int | None = None, first: int = 0) -> None:
        self.count, self.current, self.first = count, chosen, first

    def is_available(self) -> bool:
        return self.count > 0

    def is_initialized(self) -> bool:
        return self.current is not None

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.current = index

    def current_device(self) -> int:
        self.current = self.current or 0  # asking makes GPU 0 the current one, as in torch
        return self.current

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(uuid=f"GPU-{self.first + device.index}")


@contextmanager
def on(machine: Machine) -> Iterator[Machine]:
    with mock.patch.object(torch, "cuda", machine):
        yield machine


def test_a_process_gets_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with on(Machine(4)) as machine:
        assert own_device("cuda") == torch.device("cuda", 2)
        assert machine.current == 2
    with on(Machine(1)):  # the scheduler shows each process one
        assert own_device("cuda") == torch.device("cuda", 0)
    with on(Machine(4, chosen=3)):  # the user has chosen
        assert own_device("cuda") == torch.device("cuda", 3)
    with on(Machine(2)), pytest.raises(ValueError, match=r"process 2 of this machine has no GPU of its own.* it 2;"):
        own_device("cuda")
    assert own_device("cpu") == torch.device("cpu")


def test_small_tensors_do_not_choose_gpu_0_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with on(Machine(2)), mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        assert small_tensor_device(None) == torch.device("cuda", 1)  # type: ignore[arg-type]


class Current:
    """`torch.cuda` that is another machine's in each thread."""

    def __init__(self, machines: dict[int, Machine]) -> None:
        self._machines = machines

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machines[int(threading.current_thread().name)], name)


def settle(*ranks: tuple[str, str, Machine]) -> list[Any]:
    """What each rank (device type, backend, machine), a thread here, gets or raises."""
    store, results = dist.HashStore(), [None] * len(ranks)

    def run(rank: int, kind: str, backend: str) -> None:
        try:
            results[rank] = settle_device(kind, backend, store, rank, len(ranks), local_rank=rank)  # type: ignore[call-overload]
        except ValueError as error:
            results[rank] = str(error)  # type: ignore[call-overload]

    with mock.patch.object(torch, "cuda", Current({rank: machine for rank, (_, _, machine) in enumerate(ranks)})):
        threads = [
            threading.Thread(target=run, args=(rank, kind, backend), name=str(rank))
            for rank, (kind, backend, _) in enumerate(ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return results


def test_every_rank_has_its_own_gpu() -> None:
    on_one_machine = settle(("cuda", "nccl", Machine(2)), ("cuda", "nccl", Machine(2)))
    assert on_one_machine == [(torch.device("cuda", 0), 1), (torch.device("cuda", 1), 1)]
    shown_one_each = settle(("cuda", "nccl", Machine(1)), ("cuda", "nccl", Machine(1, first=1)))
    assert shown_one_each == [(torch.device("cuda", 0), 1)] * 2


def test_one_gpu_for_two_ranks_is_refused_under_nccl_and_counted_under_gloo() -> None:
    for message in settle(("cuda", "nccl", Machine(2, chosen=0)), ("cuda", "nccl", Machine(2, chosen=0))):
        assert "have the same GPU, cuda:0 (GPU-0); NCCL takes one process per GPU" in message
    shared = settle(*[("cuda", "gloo", Machine(1))] * 2, ("cuda", "gloo", Machine(1, first=1)))
    assert shared == [(torch.device("cuda", 0), 2)] * 2 + [(torch.device("cuda", 0), 1)]


def test_what_is_wrong_on_one_rank_is_raised_on_all() -> None:
    for message in settle(("cuda", "nccl", Machine(2)), ("cuda", "nccl", Machine(2)), ("cuda", "nccl", Machine(2))):
        assert message.startswith("rank 2: process 2 of this machine has no GPU of its own")
    for message in settle(("cuda", "nccl", Machine(2)), ("cpu", "gloo", Machine(0))):
        assert message.endswith("all ranks must use one device type")
        assert "rank 0" in message
        assert "rank 1" in message


@contextmanager
def grouped(backends: str, rank: int = 0) -> Iterator[None]:
    group = SimpleNamespace(rank=lambda: rank, size=lambda: 4)
    with (
        mock.patch.object(dist, "is_initialized", return_value=True),
        mock.patch.object(dist, "get_rank", return_value=rank),
        mock.patch.object(dist, "get_backend_config", return_value=backends),
    ):
        dist.distributed_c10d.GroupMember.WORLD = group
        try:
            yield
        finally:
            dist.distributed_c10d.GroupMember.WORLD = None


@pytest.mark.parametrize("built_on", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("backends", "gpus", "kind"),
    [
        ("cpu:gloo,cuda:nccl", 2, "cuda"),
        ("cuda:nccl", 2, "cuda"),
        ("cpu:gloo", 2, "cpu"),
        ("cpu:gloo,cuda:nccl", 0, "cpu"),
    ],
)
def test_with_a_process_group_the_accelerator_is_used_wherever_the_model_was_built(
    monkeypatch: pytest.MonkeyPatch, built_on: str, backends: str, gpus: int, kind: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with on(Machine(gpus)), grouped(backends, rank=1):
        device = setup.device_of(nn.Linear(2, 2, device=built_on), None)
    assert device == (torch.device("cuda", 1) if kind == "cuda" else torch.device("cpu"))


def test_a_cpu_mesh_asks_for_the_cpu() -> None:
    with on(Machine(2)), grouped("cpu:gloo,cuda:nccl"):
        mesh: Any = SimpleNamespace(device_type="cpu")
        assert setup.device_of(nn.Linear(2, 2), mesh) == torch.device("cpu")


@pytest.mark.parametrize(("built_on", "device"), [("cpu", "cpu"), ("meta", "cuda:0")])
def test_without_a_process_group_the_model_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch, built_on: str, device: str
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with on(Machine(2)):
        assert setup.device_of(nn.Linear(2, 2, device=built_on), None) == torch.device(device)


def parameter_on(kind: str) -> Callable[..., Iterator[tuple[str, Any]]]:
    return lambda **_: iter([("weight", SimpleNamespace(device=torch.device(kind)))])


def test_a_model_on_a_gpu_that_the_process_group_does_not_serve_is_refused() -> None:
    model = nn.Linear(2, 2)
    with (
        on(Machine(2)),
        grouped("cpu:gloo"),
        mock.patch.object(model, "named_parameters", parameter_on("cuda")),
        pytest.raises(ValueError, match="parameter weight is on cuda, the mesh on cpu"),
    ):
        setup._check_model(model, None)
