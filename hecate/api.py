"""`fully_shard` and `FSSDP`: wires adapters, runtime and torch FSDP2 together."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hecate.adapters.transformers import generate_in_step
from hecate.checkpoint.background import SaveHandle, Saves
from hecate.checkpoint.state import TrainingState, dense_tensors
from hecate.checkpoint.state_dict import hide_pools
from hecate.checkpoint.store import load
from hecate.config import FSSDPConfig
from hecate.names import original_modules, original_name
from hecate.pretrained.conversion import format_of
from hecate.pretrained.entries import first_names
from hecate.pretrained.own import save_through
from hecate.private_torch import default_store
from hecate.ranks.agree import agree
from hecate.ranks.heartbeat import Heartbeat
from hecate.runtime.comms import Comms, make_comms
from hecate.runtime.dense.make import make_dense, move_dense
from hecate.runtime.experts.buffers import CopiesMemory, SharedBuffers
from hecate.runtime.experts.moving_state import MovingState
from hecate.runtime.experts.optimizer_states import OptimizerStates
from hecate.runtime.experts.optimizers import OptimizerWatch
from hecate.runtime.experts.pool import ExpertPool, make_pools
from hecate.runtime.plans.ahead import PlanAhead
from hecate.runtime.plans.layer import LayerPlans, make_plans
from hecate.runtime.plans.ownership import Moved, Resharder
from hecate.runtime.setup import Setup, inspect
from hecate.runtime.step.engine import Engine
from hecate.runtime.step.layer import FSSDPExperts
from hecate.runtime.step.passes import Passes
from hecate.runtime.step.unchanged import Unchanged
from hecate.text import listed
from hecate.values.finite import non_finite
from hecate.values.full import full_experts, full_tensor
from hecate.values.initialize import Stack, initialize
from hecate.values.local import local_tensor
from hecate.values.memory import PeakMemory

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FSSDP", "fully_shard"]

STEPS_TO_MEASURE = 3
"""Of this process, or after `load`: parameters, gradients and optimizer state have their final size by then."""


def fully_shard(model: nn.Module, mesh: DeviceMesh | None = None, config: FSSDPConfig | None = None) -> FSSDP:
    """Train `model` with FSSDP: its experts by sparse collectives, the rest as `config.dense` says. In place.

    Collective. Call it before the optimizer is made, and after freezing parameters or adding LoRA to the dense part.

    For parameter groups by name: the experts of all layers with equal weights are one parameter a kind, called
    `hecate_pool_<number>_<kind>`, e.g. `hecate_pool_0_down_proj`; `engine.pools[number].specs` names the layers.
    So experts can have settings of their own, a weight kind too; with `FSSDPConfig(pools="layer")` each layer has
    parameters of its own, `number` being the layer's. A single expert cannot have any.

    In `model.state_dict()` experts have their original names instead, `[num_experts, ...]`, in the same order whoever
    owns them: DTensors, or plain tensors without a mesh. `optimizer.state_dict()` has a pool's state by layer and
    expert. The latter is collective, and so is loading either; the former once experts have moved, or where devices do
    not divide them.

    Args:
        model: any module with MoE layers that an adapter knows (`hecate.adapters.base`), on every rank the same.
        mesh: `(shard,)` or `(replicate, shard)`; by default all ranks in one dimension. Without a process group the
            model runs on one device.
        config: settings; the same on all ranks.

    Returns:
        The engine; `engine.model` is `model`.

    Raises:
        ValueError: no MoE layer, parameters sharded already, a mesh that is not of the process group, or ranks that
            disagree; before anything is changed.
    """
    return FSSDP(model, mesh, FSSDPConfig() if config is None else config)


class FSSDP:
    """A model under FSSDP. Made by `fully_shard`.

    Attributes:
        model: the model, changed in place: experts live in pools `hecate_pool_*`.
        config: as passed.
        mesh: as passed or made; None on one device.
        device: where experts live.
        pools: owned experts.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None, config: FSSDPConfig) -> None:
        while _abandoned:
            _release(*_abandoned.popleft())
        setup = inspect(model, mesh, config)
        before = [weakref.ref(p) for p in model.parameters()]
        self.model = model
        self.config = config
        self.mesh = setup.mesh
        self.device = setup.device
        self._names = [original_name(key) for key in model.state_dict(keep_vars=True)]
        self._format = format_of(original_modules(model)[""])
        heart = None if setup.mesh is None else Heartbeat(default_store(), dist.get_rank(), dist.get_world_size())
        self._comms = make_comms(setup.mesh, setup.device, setup.cost, heart)
        self._saves = Saves()
        self._copies_memory, self._memory = CopiesMemory(), PeakMemory()
        self._measured = 0  # steps
        self._without_values = set(setup.without_values)
        move_dense(setup, model)
        self.pools = make_pools(setup, model, self._comms.rank)
        sparse = config.rematerialize and setup.num_devices > 1
        shared = SharedBuffers(self._copies_memory, setup.device) if sparse else None
        layers = make_plans(setup, model, self.pools, self._comms, shared, self._copies_memory)
        experts = [FSSDPExperts.take_over(layer.module, layer.index, layer.spec) for layer in setup.layers]
        self._dense = make_dense(setup, model, [p for pool in self.pools for p in pool.parameters.values()])
        present = {id(p) for p in model.parameters()}
        replaced = [p for p in before if id(p()) not in present]
        states = OptimizerStates(self.pools, self._comms)
        self._moving = MovingState(self.pools, states)
        self._watch = OptimizerWatch(model, self.pools, states, replaced)
        self._engine = self._make_engine(setup, layers, shared)
        self._experts = experts
        for module in experts:
            module.connect(self._engine)
        self._garbage = weakref.finalize(self, _release_garbage, self._comms, self._ahead, self._saves)
        self._garbage.atexit = False  # the interpreter has its own order of ending threads
        self._watch.on_step(self._after_step)
        if self.mesh is not None:
            generate_in_step(model)
        if buffers := self._without_values - set(self._names):  # rotary frequencies, say: no file will have them
            self._without_values -= initialize(model, self._stacks(), config.seed, wanted=buffers)
        hide_pools(model, self._dense.leave, self._got_values)
        save_through(model, self._format, self.mesh is not None, self.save_pretrained, self.full_state_dict)
        self._engine.attach(model)
        self._hook = model.register_forward_pre_hook(lambda module, args: self._check_values(), prepend=True)

    def _make_engine(self, setup: Setup, layers: list[LayerPlans], shared: SharedBuffers | None) -> Engine:
        comms, dense, config = self._comms, self._dense, setup.config
        ahead = self._ahead = PlanAhead(layers, comms.topology.devices_per_node)
        resharder = Resharder(layers, setup.policy, self._watch, self._moving, comms, config.reshard_interval)
        self._resharder = resharder
        passes = Passes(layers, self.pools, comms, dense, ahead, rematerialize=shared is not None)
        unchanged = Unchanged(self.model, self.pools)
        return Engine(layers, passes, comms, dense, ahead, resharder, self._watch, shared, setup.device, unchanged)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back process groups, threads and hooks. A checkpoint that is being written is completed first.

        The model keeps its weights, but neither it nor this object can be used any more: that raises RuntimeError. Also
        done when this object is garbage; further calls do nothing. Not collective, but for a checkpoint being written.
        """
        if not self._garbage.alive:
            return
        self._saves.finish()
        self._engine.close()
        self._hook.remove()
        for module in self._experts:
            module.disconnect()
        self._garbage.detach()
        _release(self._comms, self._ahead, self._saves)

    # What a training loop calls.

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; returns the norm before, a plain scalar.

        Where the norm is NaN or infinite, gradients stay as they are, so that `non_finite` can tell which ones.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]  # none is None
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm.nan_to_num(0.0, posinf=0.0))
        return norm

    def non_finite(self, loss: Tensor | None = None) -> list[str]:
        """Names of what is NaN or infinite on any rank, weights first, by layer and expert. Collective, not cheap.

        For when `clip_grad_norm_` returned a norm that is not finite, which all ranks see, or a forward pass raised
        `hecate.errors.NonFiniteError`, which it does on all ranks. Then `skip_step`, or stop.

        Args:
            loss: of this rank; None leaves it out.
        """
        return non_finite(self.model, [entry for pool in self.pools for entry in pool.entries()], self._names, loss)

    def skip_step(self) -> None:
        """Drop the gradients and everything planned or half done since the last optimizer step. On all ranks.

        Also after a forward or backward pass that raised on all of them; the next step is as if this one had not been.
        """
        self._engine.skip_step()
        for parameter in self.model.parameters():
            parameter.grad = None

    def init_weights(self, seed: int, rule: Callable[[nn.Module], None] | None = None) -> None:
        """Give all parameters and buffers initial values: the same ones on any number of devices. Collective.

        A module is filled by the `_init_weights(module)` of its nearest ancestor that has one (transformers' models
        do), else by its own `reset_parameters()`. Stacked experts are drawn one at a time, as a stack of one; of the
        dense part this process holds one module's tensors whole while it draws them.

        Args:
            seed: of all values, together with the names of modules and the number of the expert.
            rule: fills the tensors of the module it is given, from torch's default generator; instead of the above.

        Raises:
            ValueError: a model built on the meta device has tensors that no rule fills; names them.
        """
        agree(lambda: self._fill(seed, rule))
        self._without_values = set()
        self._engine.restart(self._engine.step)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing the dense part's; experts' go to their owners all the same."""
        self._dense.set_sync(False)
        try:
            yield
        finally:
            self._dense.set_sync(True)

    @contextmanager
    def naming_missing_ranks(self) -> Iterator[None]:
        """Put it around a training loop: where a collective fails because ranks died or hang, the error names them.

        Raises:
            hecate.errors.MissingRankError: from the backend's own error.
        """
        with self._comms.guard():
            yield

    def on_reshard(self, callback: Moved) -> RemovableHandle:
        """Be told when experts have changed owners, for what remembers rows of `hecate_pool_*` outside of optimizers.

        Args:
            callback: `callback(pool_name, old_rows, new_rows)`, called on every rank after owners moved and before the
                next forward pass. Rows are int64 `[slots]` of this device: which expert of the pool is in each slot,
                counted over its layers (`engine.pools[n].specs`), -1 for padding.

        Returns:
            A handle with `.remove()`.
        """
        return self._resharder.on_move(callback)

    def follow(self, tensors: Callable[[ExpertPool], list[Tensor]]) -> None:
        """Move rows of further tensors whenever experts change owners, as those of weights and optimizer state move.

        Args:
            tensors: called on every rank with one of `engine.pools`, before it moves; returns this device's tensors
                `[slots, ...]` that belong to its experts, the same number and shapes on all ranks.
        """
        self._resharder.follow(tensors)

    def loads(self) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        """How many tokens each expert got in the last step, of all ranks and replicas, the same on every rank.

        Returns:
            int64 `[layers, experts]`; a list of int64 `[experts]` if layers have different numbers of experts.

        Raises:
            RuntimeError: no step has been made yet.
        """
        loads = self._engine.loads()
        if not loads:
            raise RuntimeError("FSSDP.loads: no optimizer step has been made yet")
        return np.stack(loads) if len({len(load) for load in loads}) == 1 else loads

    def stats(self) -> dict[str, Any]:
        """What happened in the last step.

        Returns:
            `step`: optimizer steps so far. `layers`: per MoE layer `name`, `loads` int64 `[E]` (of all ranks and
            replicas; of this replica before the first step ends), `counts` int64 `[D, E]` of this replica,
            `imbalance_before` and `imbalance_after` (max/mean device load without and with copies), `lower_bound` of
            the latter for the memory slots there are, `limited_by` (what kept it above `max_imbalance`; None if nothing
            did), `copies`, `crossings` (pairs of an expert and a foreign node that holds it), `bytes` (over all links),
            `exposed_seconds`. `memory_bytes` of this device, peaks: `owned`, `optimizer`, `gradients`, `copies`.
        """
        return {
            "step": self._engine.step,
            "policy": self.config.policy,
            "layers": self._engine.report(),
            "memory_bytes": self._memory.peaks | {"copies": self._copies_memory.peak},
        }

    def full_state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers under their original names and shapes, on CPU, on every rank. Collective.

        Raises:
            RuntimeError: the model was built on the meta device and has no values yet.
        """
        self._check_values()
        self._dense.leave()
        experts = {entry.name: entry for pool in self.pools for entry in pool.entries()}
        dense = dense_tensors(self.model, [name for name in self._names if name not in experts])
        full = {}
        for name in self._names:
            if name in experts:
                entry = experts[name]
                full[name] = full_experts(entry, local_tensor(entry.parameter), self._comms.experts)
            else:
                full[name] = full_tensor(dense[name])
        return full

    def save(
        self,
        path: str | PathLike[str],
        optimizer: Optimizer | None = None,
        async_op: bool = False,
        extra: Mapping[str, Any] | None = None,
        sha256: bool = False,
    ) -> SaveHandle | None:
        """Write a checkpoint folder with torch.distributed.checkpoint, by original names and shapes. Collective.

        Weights and buffers have their original names, optimizer state `optimizer.state.<name>.<key>`; experts are
        stacked, so that the stock `dcp.load` reads them anywhere. Also saved: parameter groups, owners, load history,
        step count, cost model; not: pending gradients. What was at `path` is replaced when the new one is complete.

        Args:
            path: the folder, on a file system that all ranks share.
            optimizer: of the model's parameters.
            async_op: copy everything to the CPU, return, and write the copy while training goes on. The next `save` or
                `load` waits for it, and so does Python when it ends; `destroy_process_group` does not disturb it. If it
                fails and nobody waits, the process says so and ends with exit code 1.
            extra: what else to keep, of numbers, strings, lists and mappings as JSON has them: the position in the
                data, a scheduler's `state_dict()`. Rank 0's is written.
            sha256: record the SHA-256 of every file beside its size and CRC-32; `load` compares what was recorded.

        Returns:
            With `async_op`, a handle whose `wait()` returns when the checkpoint is in place, or raises.

        Raises:
            OSError: it could not be written; on all ranks, and the one before is intact.
            ValueError: an optimizer of other parameters, or state or `extra` that cannot be saved.
            RuntimeError: the process group is gone, or a rank died; the one before is intact.
        """
        self._check_values()
        if optimizer is not None:
            self._watch.add(optimizer)  # it may have been loaded by expert, and have made no step since
        return self._saves.save(Path(path), self._training_state(), optimizer, async_op, extra, sha256)

    def load(self, path: str | PathLike[str], optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Read what `save` wrote, on any number of devices, or a plain `dcp.save(model.state_dict())`. Collective.

        On an equal mesh owners and cost model become the saved ones, and training goes on bit by bit; on another one
        owners become the initial ones and the cost model stays the config's. Pending gradients are dropped.

        A checkpoint of somebody else runs no code: of `.metadata` only what DCP itself writes is read, of the other
        files tensors (`torch.load(weights_only=True)`) and JSON, nothing that is stored as bytes, and no file outside
        of the folder. Its values are as trustworthy as who wrote them: a CRC-32 or SHA-256 in the same folder shows
        damage, not forgery.

        Args:
            path: the folder.
            optimizer: gets the saved state and parameter groups, whether it has made a step or not; None reads weights.

        Returns:
            The `extra` that `save` was given; empty without one.

        Raises:
            ValueError: no checkpoint, damaged (names the file), incomplete (names the tensor), of a newer format, or of
                another model or optimizer; on all ranks, before anything is overwritten.
            OSError: it could not be read.
            RuntimeError: the process group is gone.
        """
        self._saves.finish()
        extra = load(Path(path), self._training_state(), optimizer)
        self._without_values = set()
        if optimizer is not None:
            self._watch.add(optimizer)  # its state moves with the experts before it makes a step
        self._measured = 0
        self._memory.measure(self.model, self._watch.optimizers)  # there may be no more step
        return extra

    def load_pretrained(self, folder: str | PathLike[str]) -> None:
        """Read weights and buffers that transformers' `save_pretrained` or this one's wrote. Collective.

        Every rank reads the experts it owns, one at a time, and its part of each dense tensor. Keys are those of the
        model's state dict, or those that transformers converts to it (a tensor an expert, as on the hub); where a
        conversion makes a dense tensor of others, these are read whole, one such tensor at a time. Values are cast to
        the model's dtype, which is `master_dtype` if that is set. Tied parameters need to be there once. Optimizer,
        owners and load history stay as they are.

        Args:
            folder: with `model.safetensors`, or `model.safetensors.index.json` and its files.

        Raises:
            ValueError: keys lack or are not known, up to those that the model class ignores; another shape or number of
                experts; quantized weights; a conversion that mixes experts; a damaged file (names it); on all ranks,
                before anything is overwritten.
        """
        from hecate.pretrained.load import load_pretrained  # needs safetensors, an optional dependency

        self._format = load_pretrained(Path(folder), self._training_state(), self._format, self._without_values)
        self._without_values = set()

    def save_pretrained(self, folder: str | PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write weights and buffers as transformers' `from_pretrained` reads them. Collective.

        Of a transformers model also `config.json` and `generation_config.json`, and keys and shapes are those of the
        folder it was loaded from, else of its class on the hub; of any other model they are the state dict's. Weights
        keep the dtype they have here, the master weights' (`from_pretrained` casts). Ranks write side by side, each its
        own files. What was written there before is replaced when all is complete; a tokenizer or other files stay.

        Args:
            folder: on a file system that all ranks share.
            max_shard_size: bytes of one file, or like "5GB" or "500MiB"; a larger tensor has a file of its own.

        Raises:
            ValueError: a conversion that mixes experts, or a bad `max_shard_size`; on all ranks.
            RuntimeError: the model was built on the meta device and has no values yet.
            OSError: it could not be written; on all ranks, and the one before is intact.
        """
        from hecate.pretrained.save import save_pretrained  # needs safetensors, an optional dependency

        self._check_values()
        group = None if self._comms.experts is None else self._comms.experts.group
        save_pretrained(Path(folder), self._training_state(), self._format, group, max_shard_size)

    def _fill(self, seed: int, rule: Callable[[nn.Module], None] | None) -> None:
        self._dense.leave()
        given = initialize(self.model, self._stacks(), seed, rule)
        first = first_names(self.model)
        filled = {first.get(name, name) for name in given}
        if missing := {name for name in self._without_values if first.get(name, name) not in filled}:
            raise ValueError(
                f"init_weights: no rule fills {listed(missing)}; the model's `_init_weights` or the modules' "
                "`reset_parameters` must, or pass `rule`"
            )

    def _stacks(self) -> list[Stack]:
        return [stack for pool in self.pools for stack in pool.stacks()]

    def _training_state(self) -> TrainingState:
        self._dense.leave()
        group = self._comms.replicas
        replica, replicas = (0, 1) if group is None else (group.rank(), group.size())
        return TrainingState(self.model, self._names, self.pools, self._engine, replica, replicas)

    # Between passes.

    @torch.compiler.disable
    def _check_values(self) -> None:
        if not self._garbage.alive:
            raise RuntimeError("FSSDP: close() was called; it cannot be used any more")
        if self._without_values:
            raise RuntimeError(
                f"fully_shard: {listed(self._without_values)} were built on the meta device and have no values yet; "
                "call init_weights, load_pretrained or load first"
            )

    def _got_values(self, names: set[str]) -> None:
        first = first_names(self.model)
        given = {first.get(name, name) for name in names}
        self._without_values = {name for name in self._without_values if first.get(name, name) not in given}

    def _after_step(self) -> None:
        if self._measured < STEPS_TO_MEASURE:
            self._measured += 1
            self._memory.measure(self.model, self._watch.optimizers)


def _release(comms: Comms, ahead: PlanAhead, saves: Saves) -> None:
    saves.close()
    ahead.close()
    comms.close()


def _release_garbage(comms: Comms, ahead: PlanAhead, saves: Saves) -> None:
    """Garbage is collected in any thread, also in one that is to end here: then the next engine does it."""
    if threading.current_thread() is threading.main_thread():
        _release(comms, ahead, saves)
    else:
        _abandoned.append((comms, ahead, saves))


_abandoned: deque[tuple[Comms, PlanAhead, Saves]] = deque()
"""Of engines that became garbage in another thread than the main one."""
