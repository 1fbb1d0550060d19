"""Processes and their process group: joins torchrun's, or spawns `devices` processes on this machine."""

from __future__ import annotations

import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from hecate.errors import MissingRankError, NonFiniteError
from hecate.ranks.device import settle_device
from hecate.train.lock import FolderInUseError
from hecate.train.settings import Settings
from hecate.train.signals import (
    StopRequest,
    exit_code,
    forwarding,
    launches,
    listening,
    sigint_blocked,
)

__all__ = ["World", "check_launch", "launch"]

Config = Mapping[str, Any]
EXPLAINED = (ValueError, OSError, NonFiniteError, FolderInUseError)
"""Errors of the run whose message says what is wrong and what to do; MissingRankError has its own exit code."""
ERROR = "hecate/error"
PATIENCE = timedelta(seconds=3)
# Without this, gloo looks up the host name, which may not resolve on a new machine.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class World:
    """One process of the run and its process group; the collectives here are for small values of the training loop.

    Attributes:
        rank: rank of this process.
        size: number of processes, one per device.
        device: device of this process.
        mesh: all devices, one-dimensional.
        store: the group's key-value store.
        stop: whether this process was asked to stop.
        launches: launchers that started this process, and whether they restarted it, see `signals.launches`.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    store: dist.Store
    stop: StopRequest
    launches: Mapping[str, bool]

    def gather(self, values: list[float]) -> Tensor:
        """The `values` of all ranks, float64 `[size, len(values)]` on the CPU."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own)
        return torch.stack(rows).cpu()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, any small picklable object. Returns only after rank 0 has made this call too."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def launch(config: Config, run: Callable[[Config, World], None]) -> None:
    """Call `run` in every process of the run.

    Under torchrun this process is one of them; otherwise `devices` processes are spawned and waited for.

    Args:
        config: resolved configuration; plain values, so that it can be pickled.
        run: a module-level function, so that it can be pickled.

    Raises:
        ValueError: see `check_launch`.
        SystemExit: `run` raised it, here or in a spawned process, with the same code; or the ranks do not meet.
    """
    settings = Settings.from_config(config)
    check_launch(settings.devices)
    if "WORLD_SIZE" in os.environ:
        with listening(settings.requeue_exit_code) as stop:
            store, rank = _met(settings)
            name = os.environ.get("TORCHELASTIC_RUN_ID")
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                name = launch_name(store)
                store = _of_this_attempt(store, rank, settings)
            local_rank = int(os.environ.get("LOCAL_RANK", rank))
            group = _group(settings, store, rank, local_rank, stop, launches(name))
            with _requeued(settings, rank), _saying(settings, store, rank), group as world:
                run(config, world)
        return
    # The parent holds the store, so that it outlives every rank: the remaining ranks can find out who is missing.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_timeout(settings))
    try:
        with forwarding() as forwarder:
            resource_tracker.ensure_running()  # otherwise the first start does it, and unblocks SIGINT
            with sigint_blocked():
                context = mp.start_processes(_spawned, (config, store.port, run), settings.devices, join=False)
            assert context is not None  # join=False returns it
            forwarder.to(context.pids())
            while not context.join(grace_period=settings.timeout_seconds):
                pass
    except mp.ProcessExitedException as error:
        if error.exit_code > 0:  # it has said why
            sys.exit(error.exit_code)
        # A process that has not installed its handlers yet is killed by the signal.
        if forwarder.signal and forwarder.sent and error.exit_code == -forwarder.sent:
            sys.exit(exit_code(forwarder.signal, settings.requeue_exit_code))
        sys.exit(f"error: rank {error.error_index} was ended by {error.signal_name}")


def check_launch(devices: int) -> None:
    """ValueError if a launcher has started another number of processes than `devices`."""
    if (started := os.environ.get("WORLD_SIZE")) not in (None, str(devices)):
        raise ValueError(f"devices={devices}: must equal torchrun's WORLD_SIZE={started}")


def _met(settings: Settings) -> tuple[dist.Store, int]:
    """The store that all ranks have in common, and this process's rank; exits if the others are not there."""
    try:
        store, rank, _ = next(rendezvous("env://", timeout=_timeout(settings)))
    except (ValueError, dist.DistError) as error:
        if settings.debug:
            raise
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        sys.exit(f"error on rank {os.environ.get('RANK', '?')}: the ranks do not meet at {place}: {error}")
    return store, rank


def launch_name(store: dist.Store) -> str:
    """A unique name of this torchrun launch, the same on all its processes and after restarts; run ids may repeat."""
    return store.compare_set("hecate/launch", "", uuid.uuid4().hex).decode()


def _of_this_attempt(store: dist.Store, rank: int, settings: Settings) -> dist.Store:
    """A part of torchrun's store that earlier attempts (before a restart) have not written to.

    The store survives a restart, and a rank that reads an address from an earlier attempt fails to connect. Restart
    counts cannot name the attempt, because they differ between nodes. Since all processes of an attempt have ended
    before the next attempt starts, rank 0 draws a number and answers the other ranks' requests until all have it.
    """
    store = dist.PrefixStore("hecate/attempt", store)
    if rank != 0:
        name = uuid.uuid4().hex
        store.set(f"asking/{rank}", name)
        attempt = store.get(name).decode()  # blocks until rank 0 answers
        store.add(f"answered/{attempt}", 1)
        return dist.PrefixStore(attempt, store)
    attempt, end = str(store.add("attempts", 1)), time.monotonic() + settings.timeout_seconds
    while store.add(f"answered/{attempt}", 0) < settings.devices - 1:
        if time.monotonic() > end:
            raise TimeoutError(f"not all {settings.devices} ranks came within {settings.timeout_seconds} s")
        for other in range(1, settings.devices):
            if store.check([f"asking/{other}"]):
                store.set(store.get(f"asking/{other}").decode(), attempt)
        time.sleep(0.01)
    return dist.PrefixStore(attempt, store)


def _spawned(rank: int, config: Config, port: int, run: Callable[[Config, World], None]) -> None:
    settings = Settings.from_config(config)
    for name, value in LOOPBACK.items():
        os.environ.setdefault(name, value)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_timeout(settings))
    with (
        _requeued(settings, rank),
        listening(settings.requeue_exit_code) as stop,
        _saying(settings, store, rank),
        _group(settings, store, rank, rank, stop, launches(None)) as world,
    ):
        run(config, world)


@contextmanager
def _requeued(settings: Settings, rank: int) -> Iterator[None]:
    """If another rank is missing, end with `requeue_exit_code`: this one has done nothing wrong; the run can go on."""
    try:
        yield
    except MissingRankError as error:
        if settings.debug:
            traceback.print_exc()
        # The launcher may report only the process that failed first, which knows least about the cause.
        print(f"rank {rank}: {error}; exit {settings.requeue_exit_code}", file=sys.stderr, flush=True)
        sys.last_value = error  # as of an uncaught exception: the heartbeat tells the others why this rank ends
        raise SystemExit(settings.requeue_exit_code) from error


@contextmanager
def _saying(settings: Settings, store: dist.Store, rank: int) -> Iterator[None]:
    """End with exit code 1 after an error that its message explains: one line for all ranks, without a traceback.

    Other errors, and with debug=true all, keep their traceback.
    """
    try:
        yield
    except EXPLAINED as error:
        if settings.debug:
            raise
        _say_once(store, rank, f"{error}")
        sys.last_value = error  # as of an uncaught exception: the heartbeat tells the others why this rank ends
        raise SystemExit(1) from error


def _say_once(store: dist.Store, rank: int, message: str) -> None:
    """Print an error on rank 0; on another rank only if it is not that of rank 0, and with the rank."""
    said = None
    with suppress(RuntimeError):  # the store is gone, or rank 0 has no error
        if rank == 0:
            store.set(ERROR, message)
        else:
            store.wait([ERROR], PATIENCE)
            said = store.get(ERROR).decode()
    if said != message:
        print(f"error: {message}" if rank == 0 else f"error on rank {rank}: {message}", file=sys.stderr, flush=True)


@contextmanager
def _group(
    settings: Settings,
    store: dist.Store,
    rank: int,
    local_rank: int,
    stop: StopRequest,
    launched: Mapping[str, bool],
) -> Iterator[World]:
    torch.set_num_threads(settings.threads)
    kind = _kind(settings)
    backend = "nccl" if kind == "cuda" else "gloo"
    device, _ = settle_device(kind, backend, store, rank, settings.devices, local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=settings.devices,
        timeout=_timeout(settings),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        mesh = init_device_mesh(device.type, (settings.devices,))
        yield World(rank, settings.devices, device, mesh, store, stop, launched)
    finally:
        dist.destroy_process_group()


def _kind(settings: Settings) -> str:
    """Device type to train on."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.device_count() else "cpu"
    return settings.device


def _timeout(settings: Settings) -> timedelta:
    return timedelta(seconds=settings.timeout_seconds)
