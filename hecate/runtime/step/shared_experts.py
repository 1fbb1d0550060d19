"""Runs the shared experts of MoE layers while the layers' tokens travel, in models that call them after the experts.

Such a model computes `experts(hidden, index, weights) + shared_experts(x)`, where `x` is `hidden` or the tensor that it
is a view of. The first forward pass runs as the model says, and shows which of the two it is. In later ones the experts
module calls the shared experts itself, between the launch of its exchange and the wait for it, and the model's own call
gets that output. It gets it only for the very same tensor, unchanged, so results are those of the model's own order.

torch.compile traces the model's own call, so compiled models keep their order; so do shared experts with hooks (FSDP2's
or others'), which would run at another time, and models that call them before the experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hecate.adapters.hooks import called_alone
from hecate.labels import label
from hecate.private_torch import base_of, pass_modes

__all__ = ["Early", "SharedExperts"]


@dataclass
class Early:
    """How the shared experts of one layer run in one pass, for its recomputation.

    Attributes:
        base: whether they get the tensor that the experts' input is a view of; otherwise that input itself.
        asked: whether the model has asked for the output.
    """

    base: bool
    asked: bool = False


@dataclass(frozen=True)
class _Output:
    """An output that the model has not asked for yet.

    Attributes:
        layer: index of the layer.
        early: how it was computed.
        source: the tensor that it was computed from.
        version: of `source` at that time, which PyTorch counts up with every write to it.
        state: see `_state`.
        value: the output.
        again: whether a recomputation made it, which may end before it asks for the output.
    """

    layer: int
    early: Early
    source: Tensor
    version: int
    state: tuple[object, ...]
    value: Any
    again: bool

    def fits(self, module: nn.Module, layer: int, x: object) -> bool:
        """Whether the model's call of `module` for `x` computes the same."""
        same = layer == self.layer and x is self.source and self.source._version == self.version
        return same and self.state == _state(module)


class _Expected(NamedTuple):
    """A tensor that shared experts may get in the first pass: of which layer, in which `_state`, as which base.

    Only the model keeps it: of a view, which it may drop, or of the tensor behind that.
    """

    layer: int
    state: tuple[object, ...]
    base: bool
    x: weakref.ref[Tensor]


class SharedExperts:
    """The shared experts of one model.

    Args:
        modules: layer index -> shared experts of the layer. Their class is changed in place, as FSDP2's `fully_shard`
            does, to a subclass.
    """

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self._modules = {i: _take(m) for i, m in modules.items() if not isinstance(m, _SharedModule)}
        for layer, module in self._modules.items():
            module._hecate_shared = (self, layer)
        self._bases: dict[int, bool] = {}  # per layer that can run early: see `Early.base`
        self._given_up: set[int] = set()  # layers whose model did not ask for the output
        self._expected: list[_Expected] = []  # inputs that the latest layer's shared experts may get
        self._output: _Output | None = None

    def early(self) -> dict[int, Early]:
        """For a pass that begins now: the layers whose shared experts can run while tokens travel."""
        return {layer: Early(base) for layer, base in self._bases.items() if called_alone(self._modules[layer])}

    def beside_tokens(
        self, layer: int, early: dict[int, Early], hidden: Tensor, again: bool
    ) -> Callable[[], None] | None:
        """What to compute while the tokens of `layer` travel; None: nothing.

        Args:
            layer: the layer.
            early: what `early()` said when the pass began. A layer that cannot run early with this input leaves it.
            hidden: the experts' input.
            again: whether this is a recomputation.
        """
        if layer in early:
            return lambda: self._run(layer, early, hidden, again)
        if not again:  # in recomputations FSDP2 gives blocks other tensors than in the forward pass
            self._expect(layer, hidden)
        return None

    def answer(self, module: nn.Module, layer: int, x: object) -> tuple[bool, Any]:
        """Whether the output of `module` for `x` is there already, and that output; not for copies of the module."""
        if module is not self._modules.get(layer):
            return False, None
        found, self._output = self._output, None
        if found is None:
            self._learn(layer, x)
            return False, None
        if found.again:  # what the forward pass computed twice must be computed twice, for activation checkpointing
            return found.early.asked and found.fits(module, layer, x), found.value
        if found.fits(module, layer, x):
            found.early.asked = True
            return True, found.value
        self._give_up(found.layer)
        return False, None

    def forget(self) -> None:
        """Drop an output that nobody has asked for. A recomputation may end before it asks."""
        if self._output is not None and not self._output.again:
            self._give_up(self._output.layer)
        self._output = None

    def _run(self, layer: int, early: dict[int, Early], hidden: Tensor, again: bool) -> None:
        """Compute the output that the model will ask for."""
        self.forget()
        source = base_of(hidden) if early[layer].base else hidden
        if source is None:
            del early[layer]
            self._give_up(layer)
            return
        module = self._modules[layer]
        with label("shared"):
            value = module.own_forward(source)
        self._output = _Output(layer, early[layer], source, source._version, _state(module), value, again)

    def _expect(self, layer: int, hidden: Tensor) -> None:
        """See what the model gives the shared experts after the experts."""
        self._expected = []
        if layer in self._modules and layer not in self._given_up:
            inputs = {False: hidden, True: base_of(hidden)}
            given = ((base, weakref.ref(x)) for base, x in inputs.items() if x is not None)
            self._expected = [_Expected(layer, _state(self._modules[layer]), *each) for each in given]

    def _learn(self, layer: int, x: object) -> None:
        expected, self._expected = self._expected, []
        for each in expected:
            if each.layer == layer and each.x() is x and each.state == _state(self._modules[layer]):
                self._bases[layer] = each.base

    def _give_up(self, layer: int) -> None:
        """Leave the layer in the model's own order from now on."""
        self._bases.pop(layer, None)
        self._given_up.add(layer)


class _SharedModule(nn.Module):
    """Shared experts whose output may be there before they are called."""

    _hecate_shared: tuple[SharedExperts, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own class."""
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            owner, layer = self._hecate_shared
            found, output = owner.answer(self, layer, args[0])
            if found:
                return output
        return super().forward(*args, **kwargs)

    def own_forward(self, x: Tensor) -> Any:
        """The forward pass of the module's own class."""
        return super().forward(x)


def _state(module: nn.Module) -> tuple[object, ...]:
    """What the output depends on besides the input: how the pass runs, and weights, which may be swapped or written."""
    return *pass_modes(), *((id(p), p._version) for p in module.parameters())


def _take(module: nn.Module) -> _SharedModule:
    own = type(module)
    module.__class__ = type(own.__name__, (_SharedModule, own), {"__module__": own.__module__})
    assert isinstance(module, _SharedModule)
    return module
