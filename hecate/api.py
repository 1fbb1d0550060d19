"""`fully_shard` and `FSSDP`, which training loops call. What reads and writes files is in `hecate.state`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from hecate.adapters.transformers import generate_in_step
from hecate.config import FSSDPConfig
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.plans.ownership import Moved
from hecate.runtime.setup import inspect
from hecate.runtime.step.held import close_abandoned
from hecate.state import Stateful
from hecate.values.finite import non_finite

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FSSDP", "fully_shard"]


def fully_shard(model: nn.Module, mesh: DeviceMesh | None = None, config: FSSDPConfig | None = None) -> FSSDP:
    """Prepare `model` for FSSDP training: experts by sparse collectives, the rest as `config.dense` says. In place.

    Collective. Call it before making the optimizer, and after freezing parameters or adding LoRA.

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
        mesh: `(shard,)` or `(replicate, shard)`; by default all ranks in one dimension, on the accelerator if there is
            one and the process group has a backend for it, wherever the model was built: it is moved there. A mesh of
            CPUs trains on the CPU. Without a process group, one is initialized if a launcher such as torchrun has
            started several processes (WORLD_SIZE); otherwise the model runs on one device, its own.
        config: settings; the same on all ranks.

    Returns:
        The engine; `engine.model` is `model`.

    Raises:
        ValueError: no MoE layer, parameters that are sharded already, a mesh that is not over all ranks of the process
            group, ranks that pass different models or settings, or two ranks on one GPU under NCCL; before anything is
            changed.
        RuntimeError: `FSSDPConfig.kernels="hecate"` or `expert_gemm="sonicmoe"`, and a rank lacks what it needs; before
            anything is changed.
    """
    return FSSDP(model, mesh, FSSDPConfig() if config is None else config)


class FSSDP(Stateful):
    """A model under FSSDP. Made by `fully_shard`.

    Attributes:
        model: the model, changed in place: experts are in parameters `hecate_pool_*`.
        config: the config, as passed.
        mesh: the mesh, as passed or made; None on one device.
        device: device of the experts.
        pools: the pools of owned experts.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None, config: FSSDPConfig) -> None:
        close_abandoned()
        setup = inspect(model, mesh, config)
        super().__init__(model, setup)
        self.config = config
        self.mesh = setup.mesh
        self.device = setup.device
        self._kernels = setup.kernels
        if self.mesh is not None:
            generate_in_step(model)
        self._parts.watch.on_step(lambda: self._memory.after_step(self._optimizers))
        self._engine.attach(model)
        self._hook = model.register_forward_pre_hook(lambda module, args: self._check_usable(), prepend=True)

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
        if self._held.closed:
            return
        self._saves.finish()
        self._engine.close()
        self._hook.remove()
        for module in self._parts.experts:
            module.disconnect()
        self._held.close()

    # Methods for training loops.

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients, of experts and of the dense part, so that their total norm is at most `max_norm`.

        If the norm is NaN or infinite, gradients are not changed, so that `non_finite` can find the cause.

        Returns:
            The norm before scaling, a plain scalar tensor; the same on all ranks.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]  # none is None
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        dense = self._parts.dense
        if (elsewhere := dense.gradient_norm()) is not None:
            norm = torch.hypot(norm, elsewhere.to(norm))
        finite = norm.nan_to_num(0.0, posinf=0.0)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, finite)
        if elsewhere is not None:
            dense.scale_gradients((max_norm / (finite + 1e-6)).clamp(max=1.0))  # as torch does
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

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which gradients of the dense part are accumulated without being reduced.

        Gradients of experts are still reduced to their owners in every backward pass. With replicas, they are kept
        apart until a backward pass outside of this context averages them; `zero_grad()` does not drop them, as it does
        not drop what FSDP2 keeps, but `skip_step` does.
        """
        self._parts.dense.set_sync(False)
        try:
            yield
        finally:
            self._parts.dense.set_sync(True)

    @contextmanager
    def naming_missing_ranks(self, exit_code: int | None = None) -> Iterator[None]:
        """Context for a training loop: if a collective fails because ranks died or hang, the error names them.

        Over NCCL a collective with a missing rank raises nothing; the host waits until NCCL ends the process. Which
        rank is missing is therefore also written to the log of every rank, some 30 s after its last heartbeat.

        Args:
            exit_code: end the process with this code if a rank is missing and this one has been stuck inside the
                context for 20 s, for launchers that start a job again; None leaves the end to NCCL.

        Raises:
            hecate.errors.MissingRankError: chained to the backend's own error.
        """
        with self._comms.guard(exit_code):
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
        return self._parts.resharder.on_move(callback)

    def follow(self, tensors: Callable[[ExpertPool], list[Tensor]]) -> None:
        """Move the rows of further tensors together with weights and optimizer state whenever experts change owners.

        Args:
            tensors: called on every rank with one of `engine.pools` before its experts move; returns this device's
                tensors `[slots, ...]` that belong to the pool, the same number and shapes on all ranks.
        """
        self._parts.resharder.follow(tensors)

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

    def foresee(self, counts: object) -> None:
        """Plan the copies of the next step from these loads instead of past ones. Collective.

        For loads that are known, as in replays of recorded routing, or guessed. They change which copies are made and
        so the time of the step, never its results: tokens go where the router sends them. If the step has no pass with
        gradients yet, it uses the loads (passes without, such as a rollout that records routing, may come first);
        otherwise the next step does. The one after it uses the history again. "ep" makes no copies, and where the cost
        model says that nothing is hidden, "balanced" leaves them to `calibrate`.

        Args:
            counts: int `[layers, D, E]`, tokens that each of the D devices which share the experts will route to each
                expert in all micro-batches of the step, the same on all of them; a list of int numpy arrays `[D, E]`
                if layers have different numbers of experts. Or a list of int tensors `[T, k]`, one per layer: the
                experts of this rank's tokens (-1: none), which are counted and exchanged.

        Raises:
            ValueError: a wrong number of layers, shape or dtype, counts < 0, experts that do not exist, or ranks that
                pass different counts; on all ranks, and nothing is changed.
        """
        self._check_usable()
        self._engine.foresee(counts)

    def stats(self) -> dict[str, Any]:
        """Statistics of the last step.

        Returns:
            A dictionary with these keys:

            - `step`: optimizer steps so far.
            - `policy`: name of the policy.
            - `expert_gemm`: as configured; see `FSSDPConfig.expert_gemm`.
            - `kernels`: "hecate" or "torch", what runs between the collectives; see `FSSDPConfig.kernels`. Tokens that
              cross each node border once are moved by torch's operations in either case.
            - `transport`: what carries copies and gradients: "symmetric" (memory that all ranks read), or the backend
              that sends them, "nccl" or "gloo"; None on one device. See `FSSDPConfig.transport`.
            - `splits`: as configured; see `FSSDPConfig.splits`.
            - `layers`: a dictionary per MoE layer: `name`; `loads`, int64 `[E]`, of all ranks and replicas (of this
              replica before the first step ends); `counts`, int64 `[D, E]`, of this replica; `imbalance_before` and
              `imbalance_after`, max/mean device load without and with copies; `lower_bound`, of `imbalance_after` for
              the available memory slots; `limited_by`, what kept `imbalance_after` above `max_imbalance`, None if
              nothing did; `copies`; `crossings`, pairs of an expert and a node that holds it other than its owner's;
              `bytes`, sent over all links; `exposed_seconds`, time that compute waited for copies and gradients.
              Of the last micro-batch: `copied`, int64 `[copies, 2]`, pairs (expert, device), and `calibrated`, bool
              `[copies]`, whether they were made after the gate; `no_copies`, if there are none, why.
              `device_loads_before` and `device_loads_after`, int64 `[D]`, without and with copies; `predicted`, int64
              `[E]`, mean of the loads that copies were planned from (None without history), and `mispredicted`, the
              share of tokens at other experts than predicted; `exposed`, seconds by label (`hecate.labels`): gather,
              reduce and average are waits of the device, count and plan are times of the host.
            - `exposed`: the same, summed over layers, and with re-sharding and the wait for plans before the step.
            - `planning_seconds`: time that threads took to plan the step's copies, mostly beside the backward pass.
            - `resharded`: `experts` that changed owners before the step, and `bytes` that moved.
            - `memory_bytes`: peaks on this device: `owned`, `optimizer`, `gradients`, `copies`. If the policy keeps
              copies between steps, their weights count as copies, their optimizer state and gradients with the others.
        """
        copies = self._parts.copies_memory.peak + sum(kept.num_bytes for kept in self._parts.kept)
        return {
            "step": self._engine.step,
            "policy": self.config.policy,
            "expert_gemm": self.config.expert_gemm,
            "kernels": "hecate" if self._kernels else "torch",
            "transport": self._engine.comms.transport,
            "splits": self.config.splits,
            **self._engine.report(),
            "memory_bytes": self._memory.peaks | {"copies": copies},
        }
