"""How kernels are launched on CUDA, with a stand-in for CuPy and for torch's device, and what is said without one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from hecate.ops.kernels import cuda
from hecate.ops.kernels.choice import Work, reason_against, wanted
from hecate.ops.kernels.launch import Launch
from hecate.ops.kernels.source import read

DEVICE = torch.device("cuda", 0)


class FakeKernel:
    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[Any] = []
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
        self.calls.append((grid, block, args, shared_mem))


class FakeModule:
    made: ClassVar[list[FakeModule]] = []

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        self.code, self.options = code, options
        self.kernels: dict[str, FakeKernel] = {}
        FakeModule.made.append(self)

    def compile(self) -> None:
        pass

    def get_function(self, name: str) -> FakeKernel:
        return self.kernels.setdefault(name, FakeKernel(name))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A CUDA device with CuPy, as far as `hecate.ops.kernels.cuda` looks."""
    cupy: Any = ModuleType("cupy")
    cupy.__version__ = "14"
    cupy.RawModule = FakeModule
    cupy.cuda = SimpleNamespace(ExternalStream=lambda address, index: nullcontext((address, index)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=7))
    forget()
    yield cupy
    forget()


def forget() -> None:
    FakeModule.made.clear()
    for cached in (cuda.missing, cuda._module, cuda._function, cuda._stream):
        cached.cache_clear()


def test_arguments_go_by_value(device: ModuleType) -> None:
    launch = Launch("sort", "count", 5, (256, 1), 64, (torch.zeros(3), None, 7, True, 0.5, [1, [2]]))
    words = launch.words()
    assert words[1:4].tolist() == [0, 7, 1]
    assert words[4:5].view(np.float64).item() == 0.5
    assert words[5:].tolist() == [1, 2]
    cuda.launch("sort", "count", 5, (256, 1), 64, words, DEVICE)
    (module,) = FakeModule.made
    assert (module.code, module.options) == (read("sort"), ("-std=c++17",))
    ((grid, block, (argument,), shared),) = module.kernels["count"].calls
    assert (grid, block, shared) == ((5, 1, 1), (256, 1, 1), 64)
    assert argument.size == 1  # CuPy passes an array of one element by value
    assert argument.tobytes() == words.tobytes()


def test_a_kernel_asks_for_more_shared_memory_than_every_kernel_may_have(device: ModuleType) -> None:
    for shared in (48 * 1024, 60_000):
        cuda.launch("quota", "quota", 1, (256, 1), shared, np.zeros(2, dtype=np.int64), DEVICE)
    assert len(FakeModule.made) == 1  # compiled once
    assert FakeModule.made[0].kernels["quota"].max_dynamic_shared_size_bytes == 60_000


def test_uses_the_kernels_where_it_can(device: ModuleType) -> None:
    for choice in ("auto", "hecate", "torch"):
        assert reason_against(choice, DEVICE) is None
    assert [wanted(choice, DEVICE) for choice in ("auto", "hecate", "torch")] == [True, True, False]


def test_on_the_cpu_torch_is_the_choice_unless_the_kernels_are_asked_for() -> None:
    cpu = torch.device("cpu")
    assert [wanted(choice, cpu) for choice in ("auto", "hecate", "torch")] == [False, True, False]


@pytest.mark.parametrize("lacks", ["device", "capability", "cupy", "compiler"])
def test_one_line_says_what_is_missing(lacks: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeModule) -> None:
        raise RuntimeError("CUDA_ERROR_OLD: the driver is too old\nmore lines")

    if lacks == "device":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif lacks == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    elif lacks == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    else:
        monkeypatch.setattr(FakeModule, "compile", fail)
    reason = {
        "device": "torch sees no CUDA device",
        "capability": "cuda:0 has compute capability 7.0, they need 8.0",
        "cupy": "CuPy cannot be imported (import of cupy halted; None in sys.modules)",
        "compiler": "CuPy 14 cannot compile or load a kernel (CUDA_ERROR_OLD: the driver is too old)",
    }[lacks]
    assert reason_against("auto", DEVICE) == reason
    with pytest.raises(RuntimeError) as error:
        reason_against("hecate", DEVICE)
    assert str(error.value) == f'kernels="hecate": {reason}; use kernels="auto" or kernels="torch" to run without them'


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (Work("moe", 8, (torch.float64, torch.float64)), "moe has weights in torch.float64"),
        (Work("moe", 8, (torch.float32, torch.float64)), "moe computes in torch.float64"),
        (Work("moe", 5000, (torch.float32, torch.bfloat16)), "moe has 5000 experts, they sort at most 4096"),
    ],
)
def test_work_that_no_kernel_does(work: Work, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        reason_against("hecate", torch.device("cpu"), [Work("first", 4, (torch.float32,) * 2), work])
