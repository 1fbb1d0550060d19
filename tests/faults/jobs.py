"""Starts trainers as processes that a test can signal or kill, and reads the files of their runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh

from hecate.checkpoint.history import latest
from hecate.private_torch import default_store
from hecate.ranks.agree import agree, on_rank_0
from hecate.train.distributed import World
from hecate.train.folder import RunFolder
from hecate.train.loggers import read_metrics
from hecate.train.loop import Trainer
from hecate.train.settings import Settings
from hecate.train.signals import StopRequest
from tests.train.configs import config

TINY = (
    "model.d_model=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.max_length=32",
    "validation.sequences=5",
    "optimizer.warmup=2",
    "report=false",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
POLL_SECONDS = 0.005
PATIENCE = 300
"""Seconds after which a test gives up waiting."""
MARK = "HECATE_TEST_JOB"
"""Environment variable set in all processes of a job, by which they are found again."""


def write_text(root: Path) -> Path:
    """Write a small text to train on."""
    (root / "text").mkdir()
    for i in range(12):
        (root / "text" / f"{i}.txt").write_text(f"The {i}. file of {i * i} words. " * 40)
    return root


def own_environment() -> dict[str, str]:
    """The environment without torchrun's variables: the ranks of a job form a group of their own."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}


def command(root: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments for subprocess that run `hecate.train` in the folder `root`, which contains the text."""
    start = (sys.executable, *launcher, "-m", "hecate.train", f"data.path={root / 'text'}", *TINY, *overrides)
    return {"args": start, "cwd": root, "env": own_environment(), "text": True}


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def make_trainer(
    kind: Callable[[Settings, World, RunFolder], AnyTrainer],
    root: str,
    *overrides: str,
    sizes: tuple[str, ...] = TINY,
) -> AnyTrainer:
    """Run the trainer on every rank of a test group; the run's folder is in `root`, which contains the text."""
    plain = config(*sizes, f"data.path={root}/text", f"output={root}", *overrides)
    settings = Settings.from_config(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cpu = torch.device("cpu")
    world = World(dist.get_rank(), dist.get_world_size(), cpu, mesh, default_store(), StopRequest(), {})
    folder = RunFolder(settings.folder, plain, settings.overwrite, {})
    agree(lambda: on_rank_0(folder.prepare))
    return kind(settings, world, folder)


class Job:
    """A trainer and its processes; those still running at the end of the `with` block are killed.

    Args:
        root: the folder that it runs in.
        name: the name of the run.
        start: arguments for subprocess, see `command`.
    """

    def __init__(self, root: Path, name: str, start: dict[str, Any]) -> None:
        self.root, self.run, self._mark = root, root / "runs" / name, uuid.uuid4().hex
        self.process = subprocess.Popen(
            **{**start, "env": {**start["env"], MARK: self._mark}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while left := marked(self._mark):
            for pid in left:
                with suppress(ProcessLookupError):  # the process has ended
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(POLL_SECONDS)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_for_step(self, step: int) -> None:
        """Wait until that step has been logged."""
        self.wait_until(lambda: last_step(self.run) >= step, f"step {step}")

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds. AssertionError if the job ends first, or if it takes too long."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"{what}: the job ended\n{self.process.communicate()[0]}"
            assert time.monotonic() < end, f"{what}: did not happen within {PATIENCE} s"
            time.sleep(POLL_SECONDS)

    def ranks(self) -> list[int]:
        """Process ids of the ranks: the descendants that torch spawned, or that torchrun or srun started."""
        found = [pid for pid in descendants(self.process.pid) if is_rank(pid)]
        return sorted(found)

    def end(self, expect: int) -> str:
        """Wait until the job ends and check its exit code; returns what was printed."""
        output, _ = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == expect, output
        return output


def descendants(parent: int) -> list[int]:
    """Process ids of all descendants of `parent`."""
    try:
        children = [int(c) for c in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except FileNotFoundError:  # the process has ended
        return []
    return [pid for child in children for pid in (child, *descendants(child))]


def marked(mark: str) -> list[int]:
    """Ids of the processes that have this `MARK` in their environment."""
    found, own = [], f"{MARK}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            if own in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def is_rank(pid: int) -> bool:
    """Whether the process was spawned by torch.multiprocessing, or runs the trainer under a launcher."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False
    return b"spawn_main" in words or (b"hecate.train" in words and b"torch.distributed.run" not in words)


def last_step(run: Path) -> int:
    """The last step that was logged; 0 before the first."""
    log = run / "metrics.jsonl"
    return max((m["step"] for m in read_metrics(log)), default=0) if log.exists() else 0


def losses(run: Path) -> list[float]:
    """The losses of all steps."""
    return [m["loss"] for m in read_metrics(run / "metrics.jsonl")]


def validation(run: Path) -> float:
    """Validation bits per byte at the end."""
    return float(json.loads((run / "summary.json").read_text())["val_bits_per_byte"])


def final_state(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint: weights, optimizer, planners."""
    path = latest(run / "checkpoints")
    assert path is not None
    return tensors(path)


def tensors(path: Path) -> dict[str, Tensor]:
    """All entries of a checkpoint, read with torch only."""
    reader = dcp.FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata.items()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended here
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def differences(run: Path, other: Path) -> list[str]:
    """Names of everything that is not bit for bit the same in two finished runs."""
    left, right = final_state(run), final_state(other)
    found = [f"tensor {n}" for n in left.keys() | right.keys() if not _equal(left.get(n), right.get(n))]
    found += ["losses"] * (losses(run) != losses(other))
    return found + ["validation"] * (validation(run) != validation(other))


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and torch.equal(left, right)
