"""An average of weights that follows experts when they change owners."""

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

    `average = decay * average + (1 - decay) * weight`. Each device averages what it has of the weights, so the average
    takes as much memory as they do. Buffers are not averaged.

    Args:
        engine: of the model, which has its values already; the average begins with them.
        decay: in [0, 1].

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
        """Take in the present weights; usually after each optimizer step."""
        self._check_owners()
        for name, tensor in self._weights():
            self._average[name].lerp_(tensor, 1 - self.decay)

    @contextmanager
    def apply(self) -> Iterator[None]:
        """The model has the average inside, e.g. for validation, and its own weights again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The average as `model.state_dict()` would give it, in memory of its own. Collective as that is."""
        with self.apply():
            return {name: value.clone() for name, value in self._engine.model.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict()` gave, at any ownership; buffers in it are left alone. Collective."""
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
        """Name and this device's part of each floating-point parameter, as the optimizer has it."""
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
        """What moves with the rows of `pool`."""
        self._check_owners()
        names = {id(p): name for name, p in self._engine.model.named_parameters()}
        return [self._average[names[id(p)]] for p in pool.parameters.values() if p.is_floating_point()]

    def _remember_owners(self) -> None:
        self._owners = [pool.owners for pool in self._engine.pools]

    def _check_owners(self) -> None:
        """RuntimeError if owners changed otherwise than by re-sharding, which the average follows."""
        if any(known is not pool.owners for known, pool in zip(self._owners, self._engine.pools, strict=True)):
            raise RuntimeError(
                "ExpertAverage: FSSDP.load gave experts other owners, so the average has rows of other experts; call "
                "ExpertAverage.load_state_dict after it"
            )
