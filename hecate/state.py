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

from hecate.adapters.peft import base_model, refuse_initial_values
from hecate.adapters.stack import StackedExperts
from hecate.checkpoint.background import SaveHandle, Saves
from hecate.checkpoint.state import TrainingState
from hecate.checkpoint.state_dict import hide_pools
from hecate.checkpoint.store import load
from hecate.experts import OwnedExperts
from hecate.names import original_modules, original_name
from hecate.pretrained.conversion import Format, format_of, mixes_experts
from hecate.pretrained.own import save_through
from hecate.ranks.agree import agree, gather
from hecate.runtime.setup import Setup
from hecate.runtime.step.assemble import Parts, assemble
from hecate.runtime.step.held import Held
from hecate.values.full import full_experts, full_tensor
from hecate.values.initialize import initialize
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
        self._kept = {e.name: e for layer in setup.layers for e in layer.spec.elsewhere.values()}
        self._names = [original_name(key) for key in model.state_dict(keep_vars=True)]
        root = original_modules(model)[""]
        self._format = format_of(root)  # of folders that are written, and read unless the model has adapters
        self._base_format = None if base_model(root) is root else format_of(base_model(root))
        self._seed = setup.config.seed
        _warn_of_mixed_experts(type(model).__name__, self._format, setup)
        self._parts: Parts = assemble(setup, model)
        self._engine, self._comms, self.pools = self._parts.engine, self._parts.comms, self._parts.pools
        self._saves = Saves()
        self._held = Held(self, self._saves, self._parts.threads, self._comms)
        self._memory = PeakMemory(model, [p for kept in self._parts.kept for p in kept.parameters.values()])
        self._missing = MissingValues(model, setup.without_values)
        self._missing.fill_buffers(self._parts.stacks(), setup.config.seed, set(self._names))
        hide_pools(model, self._parts.dense.leave, self._missing.got)
        model.register_load_state_dict_post_hook(lambda module, keys: self._parts.took_weights())
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
            ValueError: the model was built on the meta device and has tensors that no rule fills, or it has adapters
                of peft and `rule` is None; names them.
        """

        def fill() -> None:
            if rule is None:
                refuse_initial_values(self.model)
            self._parts.dense.leave()
            self._missing.fill_all(self._parts.stacks(), seed, rule)

        agree(fill)
        self._missing.got_all()
        self._parts.took_weights()
        self._engine.restart(self._engine.step)

    def full_state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers under their original names and shapes, on CPU, on every rank. Collective.

        Raises:
            RuntimeError: the model was built on the meta device and has no values yet.
        """
        self._check_usable()
        state = self._training_state()
        experts = {entry.name: entry for pool in self.pools for entry in pool.entries()}
        dense = state.dense()
        full = {}
        for name in self._names:
            if name in experts:
                full[name] = self._whole(experts[name], experts[name].parameter)
            else:
                full[name] = full_tensor(dense[name])
        for prefix, module in self._stacked.items():
            full = module.named_by_expert(full, f"{prefix}.")
        return full

    def _whole(self, entry: OwnedExperts, slots: Tensor) -> Tensor:
        """A stacked weight, or its gradient or state `slots`, whole and in the shape that the model keeps it in."""
        stack = full_experts(entry, local_tensor(slots), self._comms.experts)
        return self._kept[entry.name].as_kept(stack) if entry.name in self._kept else stack

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
        with self._parts.dense.with_state(optimizer):
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
        state = self._training_state()
        extra = load(Path(path), state, optimizer)
        self._missing.got_all()
        self._parts.took_weights(state.masters)
        if optimizer is not None:
            self._parts.dense.took_state(optimizer)
            self._parts.watch.hold(optimizer)  # its state must move if experts change owners before its first step
        self._memory.after_loading(self._optimizers)
        return extra

    def load_pretrained(self, folder: str | PathLike[str]) -> None:
        """Read weights and buffers written by transformers' `save_pretrained` or by this class's. Collective.

        Every rank reads the experts it owns, one at a time, and its part of each dense tensor. Keys are those of the
        model's state dict, or keys that transformers converts to them (e.g. one tensor per expert, as on the hub). If a
        conversion makes a dense tensor from several others, these are read whole, for one such tensor at a time. Values
        are cast to the model's dtype, which is `master_dtype` if that is set. Tied parameters need to be present only
        once. Optimizer, owners and load history are not changed.

        If peft has put LoRA adapters into the model, the folder is one of the base model, or one that peft has written
        for the adapters. Adapters that have no values when the base model is read get those that peft gives new ones.

        Args:
            folder: contains `model.safetensors`, or `model.safetensors.index.json` and the files it lists, or
                `adapter_model.safetensors`.

        Raises:
            ValueError: missing or unknown keys, except those that the model class ignores; a different shape or number
                of experts; quantized weights; a conversion that mixes experts; a damaged file (names it). On all ranks,
                before anything is overwritten.
        """
        from hecate.pretrained.adapters import is_of_adapters, load_adapters, names_in_base
        from hecate.pretrained.load import load_pretrained  # needs safetensors, an optional dependency

        state = self._training_state()
        if any(gather(is_of_adapters(Path(folder)))):
            self._missing.got(load_adapters(Path(folder), state, self._kept))
        else:
            names = names_in_base(original_modules(self.model)[""], self._names)
            form = self._base_format or self._format
            form = load_pretrained(Path(folder), state, form, self._missing.names, names)
            if self._base_format is None:
                self._format = form
            self._missing.got(set(names) | (self._missing.names - set(self._names)))
            self._fill_adapters()
        self._parts.took_weights(state.masters)

    def _fill_adapters(self) -> None:
        """Give adapters that have no values yet peft's first ones."""
        from hecate.pretrained.adapters import first_values

        if missing := set(self._missing.names):
            rule = agree(lambda: first_values(self.model, missing))
            stacks = self._parts.stacks()
            self._missing.got(agree(lambda: initialize(self.model, stacks, self._seed, rule, missing)))

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
        masters = self._parts.dense.masters()
        return TrainingState(self.model, self._names, self.pools, self._engine, replica, replicas, masters)

    @property
    def _optimizers(self) -> list[Optimizer]:
        """All optimizers that have state of this model."""
        kept = [optimizer for kept in self._parts.kept for optimizer in kept.optimizers]
        return [*self._parts.watch.optimizers, *self._parts.dense.optimizers, *kept]

    @torch.compiler.disable
    def _check_usable(self) -> None:
        if self._held.closed:
            raise RuntimeError("FSSDP: close() was called; it cannot be used any more")
        self._missing.check()


def _warn_of_mixed_experts(model: str, form: Format, setup: Setup) -> None:
    stacked = [layer.spec.name_of(weight.kind) for layer in setup.layers for weight in layer.spec.weights]
    if reason := mixes_experts(form, stacked):
        warnings.warn(
            f"fully_shard: {model}: load_pretrained and save_pretrained will refuse folders of the hub's format: "
            f"{reason}, which mixes experts; load with transformers before fully_shard, and save with FSSDP.save",
            stacklevel=5,
        )
