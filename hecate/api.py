"""`fully_shard` and `FSSDP`: connects adapters, runtime and torch FSDP2."""

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
"""Steps after the start or after `load` in which memory is measured: by then all tensors have their final size."""


def fully_shard(model: nn.Module, mesh: DeviceMesh | None = None, config: FSSDPConfig | None = None) -> FSSDP:
    """Prepare `model` for FSSDP training: experts by sparse collectives, the rest as `config.dense` says. In place.

    Collective. Call it before making the optimizer, and after freezing parameters or adding LoRA to the dense part.

    Parameter groups: the experts of all layers with equal weights are one parameter per weight kind, called
    `hecate_pool_<number>_<kind>`, e.g. `hecate_pool_0_down_proj`; `engine.pools[number].specs` lists its layers. So
    optimizer settings can differ between experts and the dense part, and between weight kinds. With
    `FSSDPConfig(pools="layer")` every layer has its own parameters, `number` is the layer's index, and settings can
    differ between layers too. They cannot differ between experts of one layer.

    State dicts: in `model.state_dict()` experts have their original names and shapes `[num_experts, ...]`, in the same
    order whatever their owners; they are DTensors, or plain tensors without a mesh. `optimizer.state_dict()` has a
    pool's state by layer and expert. `optimizer.state_dict()` and loading of either are collective;
    `model.state_dict()` is collective after experts have changed owners, or if the number of devices does not divide
    the number of experts.

    Args:
        model: any module with MoE layers that an adapter knows (`hecate.adapters.base`); the same on every rank.
        mesh: `(shard,)` or `(replicate, shard)`; by default all ranks in one dimension. Without a process group the
            model runs on one device.
        config: settings; the same on all ranks.

    Returns:
        The engine; `engine.model` is `model`.

    Raises:
        ValueError: no MoE layer, parameters that are sharded already, a mesh that is not over all ranks of the process
            group, or ranks that pass different models or settings; before anything is changed.
    """
    return FSSDP(model, mesh, FSSDPConfig() if config is None else config)


class FSSDP:
    """A model under FSSDP. Made by `fully_shard`.

    Attributes:
        model: the model, changed in place: experts are in parameters `hecate_pool_*`.
        config: the config, as passed.
        mesh: the mesh, as passed or made; None on one device.
        device: device of the experts.
        pools: the pools of owned experts.
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
        self._measured = 0  # steps in which memory was measured
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
        if buffers := self._without_values - set(self._names):  # e.g. rotary frequencies, which no file contains
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
        """Release process groups, threads and hooks, after completing a checkpoint that is being written.

        The model keeps its weights, but neither it nor this object can be used any more; using them raises
        RuntimeError. Groups and threads are also released when this object is garbage collected. Further calls do
        nothing. Not collective, unless a checkpoint is being written.
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

    # Methods for training loops.

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their total norm is at most `max_norm`.

        If the norm is NaN or infinite, gradients are not changed, so that `non_finite` can find the cause.

        Returns:
            The norm before scaling, a plain scalar tensor; the same on all ranks.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]  # none is None
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm.nan_to_num(0.0, posinf=0.0))
        return norm

    def non_finite(self, loss: Tensor | None = None) -> list[str]:
        """Names of what is NaN or infinite on any rank, weights first, by layer and expert. Collective and slow.

        Call it on all ranks after `clip_grad_norm_` has returned a norm that is not finite, or after a forward pass has
        raised `hecate.errors.NonFiniteError`; both happen on all ranks. Then call `skip_step`, or stop training.

        Args:
            loss: loss of this rank; None leaves it out.

        Returns:
            Names, the same on all ranks; weights and buffers, then losses, then gradients.
        """
        return non_finite(self.model, [entry for pool in self.pools for entry in pool.entries()], self._names, loss)

    def skip_step(self) -> None:
        """Drop gradients, plans and unfinished passes since the last optimizer step. Call it on all ranks.

        It may also be called after a forward or backward pass that raised on all ranks. The next step then runs as if
        this one had never begun.
        """
        self._engine.skip_step()
        for parameter in self.model.parameters():
            parameter.grad = None

    def init_weights(self, seed: int, rule: Callable[[nn.Module], None] | None = None) -> None:
        """Give all parameters and buffers initial values, the same on any number of devices. Collective.

        A module is filled by the `_init_weights(module)` of its nearest ancestor that has one (transformers' models
        do), else by its own `reset_parameters()`. Stacked experts are drawn one at a time, each as a stack of one
        expert. For the dense part, a process holds the unsharded tensors of one module at a time while it draws them.

        Args:
            seed: each tensor's values depend only on this seed, the name of its module, and the expert's id.
            rule: called with a module, fills its tensors from torch's default generator; replaces the rules above.

        Raises:
            ValueError: the model was built on the meta device and has tensors that no rule fills; names them.
        """
        agree(lambda: self._fill(seed, rule))
        self._without_values = set()
        self._engine.restart(self._engine.step)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which gradients of the dense part are accumulated without being reduced.

        Gradients of experts are still reduced to their owners in every backward pass.
        """
        self._dense.set_sync(False)
        try:
            yield
        finally:
            self._dense.set_sync(True)

    @contextmanager
    def naming_missing_ranks(self) -> Iterator[None]:
        """Context for a training loop: if a collective fails because ranks died or hang, the error names them.

        Raises:
            hecate.errors.MissingRankError: chained to the backend's own error.
        """
        with self._comms.guard():
            yield

    def on_reshard(self, callback: Moved) -> RemovableHandle:
        """Register a callback for changes of owners, for code outside of optimizers that refers to rows of pools.

        Args:
            callback: `callback(pool_name, old_rows, new_rows)`, called on every rank after owners have changed and
                before the next forward pass. Rows are int64 `[slots]` of this device: the expert in each slot, counted
                over all layers of the pool (`engine.pools[n].specs`); -1 for padding.

        Returns:
            A handle with `.remove()`.
        """
        return self._resharder.on_move(callback)

    def follow(self, tensors: Callable[[ExpertPool], list[Tensor]]) -> None:
        """Move the rows of further tensors together with weights and optimizer state whenever experts change owners.

        Args:
            tensors: called on every rank with one of `engine.pools` before its experts move; returns this device's
                tensors `[slots, ...]` that belong to the pool, the same number and shapes on all ranks.
        """
        self._resharder.follow(tensors)

    def loads(self) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        """Tokens that each expert got in the last step, summed over all ranks and replicas; the same on every rank.

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
        """Statistics of the last step.

        Returns:
            A dictionary with these keys:

            - `step`: optimizer steps so far.
            - `policy`: name of the policy.
            - `layers`: a dictionary per MoE layer: `name`; `loads`, int64 `[E]`, of all ranks and replicas (of this
              replica before the first step ends); `counts`, int64 `[D, E]`, of this replica; `imbalance_before` and
              `imbalance_after`, max/mean device load without and with copies; `lower_bound`, of `imbalance_after` for
              the available memory slots; `limited_by`, what kept `imbalance_after` above `max_imbalance`, None if
              nothing did; `copies`; `crossings`, pairs of an expert and a node that holds it other than its owner's;
              `bytes`, sent over all links; `exposed_seconds`, time that compute waited for copies and gradients.
            - `memory_bytes`: peaks on this device: `owned`, `optimizer`, `gradients`, `copies`.
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

        Weights and buffers have their original names, optimizer state `optimizer.state.<name>.<key>`. Experts are
        stacked, so the stock `dcp.load` can read them on any number of devices. Parameter groups, owners, load history,
        step count and cost model are saved too; pending gradients are not. A checkpoint that was at `path` before is
        replaced when the new one is complete.

        Args:
            path: the folder, on a file system that all ranks share.
            optimizer: an optimizer of the model's parameters, whose state is saved too.
            async_op: copy everything to the CPU, return, and write the copy while training goes on. The next `save` or
                `load` waits for it, and so does Python when it ends; `destroy_process_group` does not disturb it. If
                writing fails and no wait reports it, the process prints the error and ends with exit code 1.
            extra: further values to keep, e.g. the position in the data or a scheduler's `state_dict()`: numbers,
                strings, lists and mappings as in JSON. The one of rank 0 is written.
            sha256: record the SHA-256 of every file beside its size and CRC-32; `load` checks what was recorded.

        Returns:
            With `async_op`, a handle whose `wait()` returns when the checkpoint is in place, or raises.

        Raises:
            OSError: the checkpoint could not be written; on all ranks. The one before is intact.
            ValueError: an optimizer of other parameters, or state or `extra` that cannot be saved.
            RuntimeError: the process group is gone, or a rank died. The one before is intact.
        """
        self._check_values()
        if optimizer is not None:
            self._watch.add(optimizer)  # it may have state loaded by expert, if it has not stepped since
        return self._saves.save(Path(path), self._training_state(), optimizer, async_op, extra, sha256)

    def load(self, path: str | PathLike[str], optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Read a checkpoint of `save`, on any number of devices, or of `dcp.save(model.state_dict())`. Collective.

        On an equal mesh, owners and cost model become the saved ones, and training continues bit-identically. On
        another mesh, owners become the initial ones and the cost model remains that of the config. Pending gradients
        are dropped.

        Loading an untrusted checkpoint runs no code: `.metadata` may contain only what DCP itself writes there, and
        other files only tensors (`torch.load(weights_only=True)`) and JSON. Nothing that is stored as bytes is read,
        and no file outside of the folder. The values are not authenticated: a CRC-32 or SHA-256 in the same folder
        detects damage, not forgery.

        Args:
            path: the folder.
            optimizer: gets the saved state and parameter groups, whether or not it has made a step; None: only weights
                are read.

        Returns:
            The `extra` that was passed to `save`; empty if there was none.

        Raises:
            ValueError: there is no checkpoint, or it is damaged (names the file), incomplete (names the tensor), of a
                newer format, or of another model or optimizer; on all ranks, before anything is overwritten.
            OSError: the checkpoint could not be read.
            RuntimeError: the process group is gone.
        """
        self._saves.finish()
        extra = load(Path(path), self._training_state(), optimizer)
        self._without_values = set()
        if optimizer is not None:
            self._watch.hold(optimizer)  # experts may change owners before its first step; its state must move too
        self._measured = 0
        self._memory.measure(self.model, self._watch.optimizers)  # now, because no further step may follow
        return extra

    def load_pretrained(self, folder: str | PathLike[str]) -> None:
        """Read weights and buffers written by transformers' `save_pretrained` or by this class's. Collective.

        Every rank reads the experts it owns, one at a time, and its part of each dense tensor. Keys are those of the
        model's state dict, or keys that transformers converts to them (e.g. one tensor per expert, as on the hub). If a
        conversion makes a dense tensor from several others, these are read whole, for one such tensor at a time. Values
        are cast to the model's dtype, which is `master_dtype` if that is set. Tied parameters need to be present only
        once. Optimizer, owners and load history are not changed.

        Args:
            folder: contains `model.safetensors`, or `model.safetensors.index.json` and the files it lists.

        Raises:
            ValueError: missing or unknown keys, except those that the model class ignores; a different shape or number
                of experts; quantized weights; a conversion that mixes experts; a damaged file (names it). On all ranks,
                before anything is overwritten.
        """
        from hecate.pretrained.load import load_pretrained  # needs safetensors, an optional dependency

        self._format = load_pretrained(Path(folder), self._training_state(), self._format, self._without_values)
        self._without_values = set()

    def save_pretrained(self, folder: str | PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write weights and buffers in the format that transformers' `from_pretrained` reads. Collective.

        For a transformers model, `config.json` and `generation_config.json` are written too, and keys and shapes are
        those of the folder it was loaded from, or else those that its class has on the hub. For any other model, keys
        and shapes are those of the state dict. Weights are written in their present dtype, that of the master weights
        (`from_pretrained` casts). Ranks write in parallel, each its own files. Files of an earlier save are replaced
        when all new ones are complete; a tokenizer and other files are kept.

        Args:
            folder: the folder, on a file system that all ranks share.
            max_shard_size: bytes per file, or a text like "5GB" or "500MiB"; a larger tensor gets its own file.

        Raises:
            ValueError: a conversion that mixes experts, or a bad `max_shard_size`; on all ranks.
            RuntimeError: the model was built on the meta device and has no values yet.
            OSError: the files could not be written; on all ranks. Those of an earlier save are intact.
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

    # Internal.

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
