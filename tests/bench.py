"""What the tests of the runtime run on: device, backend and dtype, as given to pytest, and how exact each dtype is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors against the plain model: the norm of the difference over that of the expected tensor.

    Attributes:
        loss, gradient, norm: of a step.
        parameter: after the optimizer's steps; AdamW takes a full step also where a gradient is mostly rounding error.
    """

    loss: float
    gradient: float
    norm: float
    parameter: float

    def of(self, what: str) -> float:
        return float(getattr(self, what))


# Measured on CPU (gloo, up to 3 ranks, the cases of tests/runtime/test_exactness.py), the largest of
#   float32:  loss 6.9e-8, gradient 3.9e-6, norm 1.2e-7, parameter 2.2e-6 (over five steps);
#   bfloat16: loss 5.1e-5, gradient 3.2e-2, norm 7.7e-3, parameter 2.6e-1 (in a step from equal weights). The last is
#   a bias that begins at zero: after one step of AdamW, all of it is the sign of its gradient.
TOLERANCES = {
    torch.float64: Tolerance(loss=1e-10, gradient=1e-10, norm=1e-10, parameter=1e-10),
    torch.float32: Tolerance(loss=1e-6, gradient=1e-5, norm=1e-6, parameter=1e-5),
    torch.bfloat16: Tolerance(loss=1e-3, gradient=1e-1, norm=3e-2, parameter=5e-1),
}


@dataclass(frozen=True)
class Bench:
    """pytest's options `--device`, `--backend` and `--dtype`.

    Attributes:
        device: "cpu" or "cuda"; several processes may share one GPU under gloo.
        backend: "gloo" or "nccl"; for cuda tensors, besides gloo for those on the CPU.
        dtype: dtype of all models; None leaves it to the test, which then takes float64 or its own.
    """

    device: str = "cpu"
    backend: str = "gloo"
    dtype: torch.dtype | None = None

    def problem(self) -> str | None:
        """Why this machine cannot run it."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "--device cuda: torch sees no GPU here"
        if self.backend == "nccl" and self.device != "cuda":
            return f"--backend nccl: carries only CUDA tensors, but --device is {self.device}"
        return None

    def lacks(self, world_size: int) -> str | None:
        """Why this machine cannot run that many ranks: NCCL takes one GPU for each."""
        if self.backend != "nccl" or world_size <= torch.cuda.device_count():
            return None
        return f"--backend nccl: {world_size} ranks, {torch.cuda.device_count()} GPUs; --backend gloo shares one"

    @property
    def backends(self) -> str:
        """As `init_process_group` takes them."""
        return "gloo" if self.device == "cpu" else f"cpu:gloo,cuda:{self.backend}"


DEFAULT = Bench()
_here = DEFAULT


def set_bench(bench: Bench, rank: int) -> None:
    """Called in every worker before its process group is made."""
    global _here
    _here = bench
    if bench.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())


def device() -> torch.device:
    """Device of this rank's model and batches."""
    return torch.device(_here.device, torch.cuda.current_device()) if _here.device == "cuda" else torch.device("cpu")


def dtype_or(own: torch.dtype) -> torch.dtype:
    """The dtype that was asked for, else the test's own."""
    return own if _here.dtype is None else _here.dtype


def mesh_of(shape: tuple[int, ...] | None) -> DeviceMesh | None:
    """A (replicate, shard) mesh; None: all ranks in one dimension."""
    return None if shape is None else init_device_mesh(_here.device, shape, mesh_dim_names=("replicate", "shard"))


def mean_over_ranks(total: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(total)
    return total / dist.get_world_size()
