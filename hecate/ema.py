"""Exponential moving average of weights that stays correct when experts change owners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hecate.api import FSSDP
from hecate.runtime.experts.pool import ExpertPool
from hecate.values.local import local_tensor

__all__ = ["ExpertAverage"]


class ExpertAverage:
    """Exponential moving average of all floating-point parameters of a model under FSSDP.

    `average = decay * average + (1 - decay) * weight`. Each device averages its own part of the weights, so the average
    takes as much memory as the weights. Buffers are not averaged.

    Args:
        engine: the engine of the model. The model must have its values already; the average starts with them.
        decay: the decay, in [0, 1].

    Raises:
        ValueError: a decay outside of [0, 1].
    """

    def __init__(self, engine: FSSDP, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"ExpertAverage: decay={decay!r}: must be a number in [0, 1]")
        self._engine = engine
        self.decay = decay
        self._average = {name: tensor.clone() for name, tensor in self._weights()}
        self._remember_owners()
        engine.follow(self._rows_of)
        engine.on_reshard(lambda *_: self._remember_owners())

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the average; usually called after each optimizer step."""
        self._check_owners()
        for name, tensor in self._weights():
            self._average[name].lerp_(tensor, 1 - self.decay)

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Context in which the model has the averaged weights, e.g. for validation; afterwards it has its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the average in the form of `model.state_dict()`. Collective if `model.state_dict()` is."""
        with self.apply():
            return {name: value.clone() for name, value in self._engine.model.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict()` returned, whatever the present owners; buffers in it are ignored. Collective."""
        buffers = {name: value.clone() for name, value in self._engine.model.named_buffers()}
        weights = {name: tensor.clone() for name, tensor in self._weights()}
        self._engine.model.load_state_dict(state_dict)
        with torch.no_grad():
            for name, tensor in self._weights():
                self._average[name].copy_(tensor)
                tensor.copy_(weights[name])
            for name, value in self._engine.model.named_buffers():
                value.copy_(buffers[name])
        self._remember_owners()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and this device's part of each floating-point parameter."""
        for name, parameter in self._engine.model.named_parameters():
            if parameter.is_floating_point():
                yield name, local_tensor(parameter)

    @torch.no_grad()
    def _swap(self) -> None:
        self._check_owners()
        for name, tensor in self._weights():
            own = tensor.clone()
            tensor.copy_(self._average[name])
            self._average[name].copy_(own)

    def _rows_of(self, pool: ExpertPool) -> list[Tensor]:
        """The averages whose rows move with those of `pool`."""
        self._check_owners()
        names = {id(p): name for name, p in self._engine.model.named_parameters()}
        return [self._average[names[id(p)]] for p in pool.parameters.values() if p.is_floating_point()]

    def _remember_owners(self) -> None:
        self._owners = [pool.owners for pool in self._engine.pools]

    def _check_owners(self) -> None:
        """RuntimeError if owners changed in another way than by re-sharding, which the average follows."""
        if any(known is not pool.owners for known, pool in zip(self._owners, self._engine.pools, strict=True)):
            raise RuntimeError(
                "ExpertAverage: FSSDP.load gave experts other owners, so the average has rows of other experts; call "
                "ExpertAverage.load_state_dict after it"
            )
