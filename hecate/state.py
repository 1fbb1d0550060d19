"""The methods of `FSSDP` by which a model gets and gives its state: initial values, checkpoints, pretrained folders."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.adapters.stack import StackedExperts
from hecate.checkpoint.background import SaveHandle, Saves
from hecate.checkpoint.state import TrainingState, dense_tensors
from hecate.checkpoint.state_dict import hide_pools
from hecate.checkpoint.store import load
from hecate.names import original_modules, original_name
from hecate.pretrained.conversion import Format, format_of, mixes_experts
from hecate.pretrained.own import save_through
from hecate.ranks.agree import agree
from hecate.runtime.setup import Setup
from hecate.runtime.step.assemble import Parts, assemble
from hecate.runtime.step.held import Held
from hecate.values.full import full_experts, full_tensor
from hecate.values.local import local_tensor
from hecate.values.memory import PeakMemory
from hecate.values.missing import MissingValues

__all__ = ["Stateful"]


class Stateful:
    """A model on the parts of an engine, and the state of both. Base class of `hecate.FSSDP`.

    Args:
        model: changed in place, see `assemble`.
        setup: the inspected model and config.
    """

    def __init__(self, model: nn.Module, setup: Setup) -> None:
        self.model = model
        self._stacked = {m.spec.name: m.module for m in setup.layers if isinstance(m.module, StackedExperts)}
        for stack in self._stacked.values():
            stack.name_by_stack()
        self._names = [original_name(key) for key in model.state_dict(keep_vars=True)]
        self._format = format_of(original_modules(model)[""])
        _warn_of_mixed_experts(type(model).__name__, self._format, setup)
        self._parts: Parts = assemble(setup, model)
        self._engine, self._comms, self.pools = self._parts.engine, self._parts.comms, self._parts.pools
        self._saves = Saves()
        self._held = Held(self, self._saves, self._parts.ahead, self._comms)
        self._memory = PeakMemory(model)
        self._missing = MissingValues(model, setup.without_values)
        self._missing.fill_buffers(self._parts.stacks(), setup.config.seed, set(self._names))
        hide_pools(model, self._parts.dense.leave, self._missing.got)
        save_through(model, self._format, setup.mesh is not None, self.save_pretrained, self.full_state_dict)

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

        def fill() -> None:
            self._parts.dense.leave()
            self._missing.fill_all(self._parts.stacks(), seed, rule)

        agree(fill)
        self._missing.got_all()
        self._engine.restart(self._engine.step)

    def full_state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers under their original names and shapes, on CPU, on every rank. Collective.

        Raises:
            RuntimeError: the model was built on the meta device and has no values yet.
        """
        self._check_usable()
        self._parts.dense.leave()
        experts = {entry.name: entry for pool in self.pools for entry in pool.entries()}
        dense = dense_tensors(self.model, [name for name in self._names if name not in experts])
        full = {}
        for name in self._names:
            if name in experts:
                entry = experts[name]
                full[name] = full_experts(entry, local_tensor(entry.parameter), self._comms.experts)
            else:
                full[name] = full_tensor(dense[name])
        for prefix, stack in self._stacked.items():
            full = stack.named_by_expert(full, f"{prefix}.")
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
        self._check_usable()
        if optimizer is not None:
            self._parts.watch.add(optimizer)  # it may have state loaded by expert, if it has not stepped since
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
        self._missing.got_all()
        if optimizer is not None:
            self._parts.watch.hold(optimizer)  # its state must move if experts change owners before its first step
        self._memory.after_loading(self._parts.watch.optimizers)
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

        self._format = load_pretrained(Path(folder), self._training_state(), self._format, self._missing.names)
        self._missing.got_all()

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

        self._check_usable()
        group = None if self._comms.experts is None else self._comms.experts.group
        save_pretrained(Path(folder), self._training_state(), self._format, group, max_shard_size)

    def _training_state(self) -> TrainingState:
        self._parts.dense.leave()
        group = self._comms.replicas
        replica, replicas = (0, 1) if group is None else (group.rank(), group.size())
        return TrainingState(self.model, self._names, self.pools, self._engine, replica, replicas)

    @torch.compiler.disable
    def _check_usable(self) -> None:
        if self._held.closed:
            raise RuntimeError("FSSDP: close() was called; it cannot be used any more")
        self._missing.check()


def _warn_of_mixed_experts(model: str, form: Format, setup: Setup) -> None:
    stacked = [f"{layer.spec.name}.{weight.kind}" for layer in setup.layers for weight in layer.spec.weights]
    if reason := mixes_experts(form, stacked):
        warnings.warn(
            f"fully_shard: {model}: load_pretrained and save_pretrained will refuse folders of the hub's format: "
            f"{reason}, which mixes experts; load with transformers before fully_shard, and save with FSSDP.save",
            stacklevel=5,
        )
