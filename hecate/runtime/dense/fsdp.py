"""The dense part sharded by torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as fsdp2

from hecate.adapters.transformers import kept_in_float32
from hecate.private_torch import at_end_of_backward, forget_step, shard_beside
from hecate.runtime.dense.base import Dense
from hecate.runtime.dense.prefetch import Prefetch
from hecate.runtime.dense.towers import Towers
from hecate.runtime.dense.unused import Unused
from hecate.runtime.setup import Setup

__all__ = ["ShardedDense"]


class ShardedDense(Dense):
    """Applies FSDP2 to the model's blocks and to the model; FSDP2's own hooks handle passes and reductions.

    A block's weights are gathered together and reduced together, those of each dtype in a group of their own. Plain
    tensors stay, for `ReplicatedDense`: parameters without dimensions, and with torch 2.11 those of all dtypes
    but the block's most common one.

    Args:
        setup: the inspected model and config; it has a mesh.
        model: changed in place.
        ignored: parameters left alone.
    """

    keeps_weights = False

    def __init__(self, setup: Setup, model: nn.Module, ignored: Iterable[nn.Parameter]) -> None:
        ignored = set(ignored) | {p for p in model.parameters() if not p.ndim}
        kept = kept_in_float32(model)
        blocks = _blocks(setup, model)
        for unit in [*blocks, model]:
            _shard(unit, setup, ignored, kept)
        assert isinstance(model, FSDPModule)
        self._model = model
        self._prefetch = Prefetch(model)
        self._towers = Towers(model, blocks)
        config, mesh = setup.config, setup.mesh
        assert mesh is not None
        widens = config.reduce_dtype not in (None, config.param_dtype)
        self._unused = Unused(model, [mesh.get_group(i) for i in range(mesh.ndim)], setup.device, widens)

    def set_sync(self, sync: bool) -> None:
        """Set it by FSDP2's `set_requires_gradient_sync`."""
        super().set_sync(sync)
        self._model.set_requires_gradient_sync(sync)

    def enter(self) -> None:
        """A pass begins. FSDP2's hooks gather the parameters; here, free those that no block has used."""
        self._prefetch.settle()
        self._towers.new_pass()

    def leave(self) -> None:
        """Nothing to do: FSDP2's hooks reshard the parameters."""

    def await_gradients(self) -> None:
        """FSDP2 reduces gradients; tell those that help it."""
        super().await_gradients()
        self._prefetch.begin_backward()
        self._unused.begin_backward()

    def leave_evaluation(self) -> None:
        """Reshard the root, whose parameters FSDP2 keeps unsharded for a backward pass.

        Otherwise optimizers and users would find unsharded parameters.
        """
        self._model.reshard()

    def reduce(self) -> None:
        """FSDP2 reduces gradients until the end of the backward pass; then take back those that no rank has."""
        self.awaited = False
        sync = self.sync
        at_end_of_backward(lambda: self._unused.end_backward(sync))  # after FSDP2's own end, which was asked for before

    def drop(self) -> None:
        """Drop unreduced gradients, and reset FSDP2's state if a pass raised."""
        forget_step(self._model)
        self._unused.forget()


def _shard(unit: nn.Module, setup: Setup, ignored: Set[nn.Parameter], kept: Set[nn.Parameter]) -> None:
    """Apply FSDP2 to one unit, with `param_dtype` for its inputs and all its weights except the `kept` ones."""
    config = setup.config
    asked = MixedPrecisionPolicy(config.param_dtype, config.reduce_dtype or config.param_dtype)
    as_is = MixedPrecisionPolicy(None, config.reduce_dtype)
    groups = _groups(unit, ignored, kept)
    precisions = [as_is if group[0] in kept else asked for group in groups]
    later = {p for group in groups[1:] for p in group}
    fsdp2(unit, mesh=setup.mesh, mp_policy=[*precisions, asked][0], ignored_params={*ignored, *later})
    assert isinstance(unit, FSDPModule)
    for group, precision in list(zip(groups, precisions, strict=True))[1:]:
        shard_beside(unit, group, precision)


def _groups(unit: nn.Module, ignored: Set[nn.Parameter], kept: Set[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters of `unit`, grouped by dtype and by whether they are `kept`.

    Frozen parameters are included: they may be trained later. The precision of the first group also applies to the
    unit's inputs, so the first group is the largest of those that are not `kept`.
    """
    groups: dict[tuple[bool, torch.dtype], list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(_parameters(unit)):
        if parameter not in ignored:
            groups.setdefault((parameter in kept, parameter.dtype), []).append(parameter)
    sizes = {key: (not key[0], sum(p.numel() for p in group)) for key, group in groups.items()}
    return [groups[key] for key in sorted(groups, key=lambda key: sizes[key], reverse=True)]


def _parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of `unit`, except those of FSDP2 units inside it."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _parameters(child)


def _blocks(setup: Setup, model: nn.Module) -> list[nn.Module]:
    """The modules to shard one by one, innermost first.

    These are modules whose class is named in `_no_split_modules` of the model or a submodule; if there are none, the
    modules that hold an MoE layer.
    """
    named = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    blocks = [m for m in model.modules() if type(m).__name__ in named]
    blocks = blocks or list(dict.fromkeys(layer.parent for layer in setup.layers))
    lists = (nn.ModuleList, nn.ModuleDict)  # have no forward pass
    return [m for m in reversed(blocks) if m is not model and not isinstance(m, lists)]
