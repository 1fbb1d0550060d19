"""Which tensors of a model that was built on the meta device have no values yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

from torch import nn

from hecate.names import first_names
from hecate.text import listed
from hecate.values.initialize import Stack, initialize

__all__ = ["MissingValues"]


class MissingValues:
    """The names of tensors without values.

    Args:
        model: the sharded model.
        names: original names of the tensors that were on the meta device.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = model
        self._names = set(names)

    @property
    def names(self) -> Set[str]:
        """Original names of the tensors that have no values yet."""
        return self._names

    def check(self) -> None:
        """RuntimeError that names the tensors without values, if there are any."""
        if self._names:
            raise RuntimeError(
                f"fully_shard: {listed(self._names)} were built on the meta device and have no values yet; "
                "call init_weights, load_pretrained or load first"
            )

    def got(self, names: Set[str]) -> None:
        """Some tensors have values now; a tied tensor has them under each of its names."""
        self._names = self._without(names)

    def got_all(self) -> None:
        """All tensors have values now."""
        self._names = set()

    def fill_buffers(self, stacks: Sequence[Stack], seed: int, in_state: Set[str]) -> None:
        """Fill buffers that are not in the state dict, for example rotary frequencies: no file contains them."""
        if buffers := self._names - in_state:
            self._names -= initialize(self._model, stacks, seed, wanted=buffers)

    def fill_all(self, stacks: Sequence[Stack], seed: int, rule: Callable[[nn.Module], None] | None) -> None:
        """Give the whole model initial values, see `FSSDP.init_weights`; ValueError if no rule fills a missing one."""
        if missing := self._without(initialize(self._model, stacks, seed, rule)):
            raise ValueError(
                f"init_weights: no rule fills {listed(missing)}; the model's `_init_weights` or the modules' "
                "`reset_parameters` must, or pass `rule`"
            )

    def _without(self, names: Set[str]) -> set[str]:
        """What is missing if the tensors `names` have values."""
        first = first_names(self._model)
        given = {first.get(name, name) for name in names}
        return {name for name in self._names if first.get(name, name) not in given}
