"""A CUDA device that does not exist: tensors on "cuda" have shapes, dtypes and devices, but no values.

Everything of torch that asks CUDA's runtime for devices, streams, events or pinned memory talks to `fake_cuda.cpp`. All
operations on tensors on "cuda" are torch's own under `FakeTensorMode`, including the rules for shapes and alignment.
Tensors on the CPU are real. So code runs as it would on a GPU until it needs a value from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dry_run.records import Fault, Launch
from tests.dry_run.streams import Streams

__all__ = ["FakeDevice", "where"]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
aten = torch.ops.aten

TO_HOST = (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default)
COPIES = (aten._to_copy.default, aten.copy_.default)
ALLOWED = {
    "_on_host": "one read per layer, of the counts",
    "book": "counts for which no layer has waited, when a backward pass begins",
    "before_step": "re-sharding compares the optimizers' state, once per reshard_interval",
    "meet": "the optimizer's state is compared once, when it is first seen",
}
"""Functions that may read from the device, and why."""
DEEP = 4
"""Frames of this repository that say where something happens."""
ALIGNED = 16
"""Bytes: TMA, through which grouped products read their operands, needs addresses and strides that are multiples."""


def where() -> str:
    """The innermost frames of this repository outside the dry run, behind the innermost one of other packages."""
    inner, own = "", []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(own) < DEEP:
        ours, path = _shown(frame.f_code.co_filename)
        if path and (ours or not (inner or own)):
            line = f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
            own, inner = ([*own, line], inner) if ours else (own, line)
        frame = frame.f_back
    return " < ".join([inner, *own] if inner else own) or "?"


@cache
def _shown(filename: str) -> tuple[bool, str]:
    """Whether a file is part of this repository, and how it is named; "" if it only passes calls on."""
    path = Path(filename)
    if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
        return True, "" if path.is_relative_to(HERE) else str(path.relative_to(ROOT))
    if "site-packages" not in path.parts or not PASS_ON.isdisjoint(path.parts):
        return False, ""
    return False, "/".join(path.parts[path.parts.index("site-packages") + 1 :])


def _allowed() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ALLOWED and Path(frame.f_code.co_filename).is_relative_to(ROOT / "hecate"):
            return True
        frame = frame.f_back
    return False


PASS_ON = {
    *("_ops.py", "utils", "_subclasses", "_library", "_tensor.py", "autograd", "_dynamo", "_compile.py"),
    *("_contextlib.py", "_foreach_utils.py"),
}
"""Files and folders of torch that only pass calls on."""


Answer = Callable[[Tensor], Tensor | None]


class FakeDevice(TorchDispatchMode):
    """Runs the operations, and collects faults and launches.

    Attributes:
        faults: in order of appearance, each once.
        log: launches into process groups.
        strict: whether host reads and pageable copies are faults now; when a model is set up they are not.
        answer: gives the values of a tensor that the host may read; None if it may not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[Fault, None] = {}
        self.log: list[Launch] = []
        self.strict = False
        self.answer: Answer = lambda tensor: None
        self._in_group_call = False
        self._fake = FakeTensorMode()
        self._streams = Streams(self.fault, where)

    @contextmanager
    def running(self) -> Iterator[FakeDevice]:
        """Context in which tensors on "cuda" are fake."""
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") comes here instead of the runtime
        try:
            with self._streams.followed(), self._fake, self, mock.patch.multiple(FakeTensor, **INSTEAD):
                yield self
        finally:
            torch._C._set_only_lift_cpu_tensors(before)

    @contextmanager
    def group_call(self) -> Iterator[None]:
        """Context in which sends and receives are one call."""
        self._in_group_call = True
        try:
            with self._streams.group_call():
                yield
        finally:
            self._in_group_call = False

    def fault(self, kind: str, what: object) -> None:
        """Note a fault, unless it is an allowed host read or the model is still set up."""
        if kind != "mixed devices" and (not self.strict or _allowed()):
            return
        self.faults[Fault(kind, where(), str(what))] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See the class."""
        torch._C._set_only_lift_cpu_tensors(True)  # a flag of the thread, and autograd has threads of its own
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it calls the operations on its local tensors
        kwargs = _indexed(kwargs or {})
        tensors = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, Tensor)]
        on_cuda = [t for t in tensors if isinstance(t, FakeTensor)]
        device = kwargs.get("device")
        if not on_cuda and (device is None or torch.device(device).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == "hecate" and func.name() in OPDEFS:  # its body, not its registered shapes
            with self._fake, self:
                return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        if func in TO_HOST and _leaves(func, args, device):
            self._streams.kernel(on_cuda, [], [])
            return self._read(func, args)
        self._check_mixed(func, args, kwargs, [t for t in tensors if not isinstance(t, FakeTensor)])
        if func is aten._grouped_mm.default:
            self._check_aligned(args[:2])
        if func.namespace == "c10d":
            self._launch(func, args)
        args, kwargs = pytree.tree_map_only(Tensor, self._faked, (args, kwargs))
        with self._fake:
            result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Tell `Streams` what the operation reads, writes and allocates."""
        if func.namespace == "c10d":
            work = next(r for r in pytree.tree_leaves(result) if isinstance(r, torch.ScriptObject))
            first, second = _fake_ones(args[0]), _fake_ones(args[1])
            reads, writes = (first, []) if func._opname == "send" else (second, first)
            self._streams.launch(_group_of(args).group_name, dist.Work.unbox(work), reads, writes)
            return
        given, made = _fake_ones((args, kwargs)), _fake_ones(result)
        writes = _fake_ones([a for a, s in zip(args, func._schema.arguments, strict=False) if _is_written(s)])
        writes += _fake_ones([kwargs.get(s.name) for s in func._schema.arguments if _is_written(s)])
        storages = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in storages]
        if fresh or writes:  # else it is a view: no kernel
            self._streams.kernel(given, [*writes, *fresh], fresh)

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _read(self, func: Any, args: tuple) -> Any:
        """The host reads a tensor of the device: from `answer`, or zeros and a fault."""
        source = args[1] if func is aten.copy_.default else args[0]
        with unset_fake_temporarily():
            values = self.answer(source)
            if values is None:
                self.fault("host read", f"{func} of {list(source.shape)}")
                values = torch.zeros(source.shape, dtype=source.dtype)
            if func is aten._local_scalar_dense.default:
                return values.item()
            return args[0].copy_(values) if func is aten.copy_.default else values

    def _check_mixed(self, func: Any, args: tuple, kwargs: dict, on_host: list[Tensor]) -> None:
        if not on_host:
            return
        if func in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            later = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
            with unset_fake_temporarily():
                pinned = later and source.is_pinned()
            if source.numel() and not pinned:
                self.fault("pageable copy", f"{func} of {list(source.shape)}")
        elif any(t.ndim for t in on_host):
            self.fault("mixed devices", f"{func} with CPU tensors {[list(t.shape) for t in on_host]}")
        elif func is not aten.fill_.Tensor:  # `x[i] = 0` fills with a number
            self.fault("CPU scalar", func)

    def _check_aligned(self, operands: tuple[Tensor, ...]) -> None:
        for tensor in operands:
            steps = [tensor.storage_offset(), *(s for s in tensor.stride() if s != 1)]
            if any(step * tensor.itemsize % ALIGNED for step in steps):
                self.fault("unaligned", f"grouped_mm operand {list(tensor.shape)}, offset and strides {steps}")

    def _launch(self, func: Any, args: tuple) -> None:
        if func._opname in ("send", "recv_"):
            if not self._in_group_call:
                self.fault("message outside a group call", func)
            return
        self.log.append(_collective(func, args, _group_of(args)))


def _address(tensor: Tensor) -> int:
    """Differs for tensors that do not share memory; fake ones have no address of their own."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize


INSTEAD = {"data_ptr": _address, "tolist": lambda tensor: tensor.cpu().tolist()}
"""Methods of fake tensors; their own `tolist` reads element by element."""


def _indexed(kwargs: dict) -> dict:
    """With the current device for "cuda": the cache of `FakeTensorMode` does not know that it changes."""
    device = kwargs.get("device")
    if device is None or torch.device(device) != torch.device("cuda"):
        return kwargs
    return kwargs | {"device": torch.device("cuda", torch.cuda.current_device())}


def _fake_ones(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, FakeTensor)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _group_of(args: tuple) -> dist.ProcessGroup:
    boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
    return dist.ProcessGroup.unbox(boxed)


def _leaves(func: Any, args: tuple, device: object) -> bool:
    """Whether this copies values from the device to the host."""
    if func is aten._local_scalar_dense.default:
        return True
    if func is aten.copy_.default:
        return not isinstance(args[0], FakeTensor) and isinstance(args[1], FakeTensor)
    return isinstance(args[0], FakeTensor) and device is not None and torch.device(device).type == "cpu"


def _collective(func: Any, args: tuple, group: dist.ProcessGroup) -> Launch:
    operation, members = func._opname, tuple(dist.get_process_group_ranks(group))
    if operation == "alltoall_base_":
        out, rows = args[0], args[1]
        splits = [a for a in args[2:] if isinstance(a, list)]
        received, sent = (_bytes_of(t, s, len(members)) for t, s in zip((out, rows), splits, strict=True))
        return Launch(group.group_name, members, operation, 0, sent, received, (), where())
    first = next(t for t in pytree.arg_tree_leaves(*args) if isinstance(t, Tensor))
    return Launch(group.group_name, members, operation, first.nbytes, (), (), (), where())


def _bytes_of(tensor: Tensor, splits: list[int], members: int) -> tuple[int, ...]:
    """Bytes to or from each member; without `splits` the rows are divided evenly."""
    row = tensor.nbytes // max(1, tensor.shape[0])
    return tuple(row * n for n in (splits or [tensor.shape[0] // members] * members))
