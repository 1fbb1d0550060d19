"""Weights and optimizer state that DeepSpeed's ZeRO keeps in flat partitions: as whole tensors per parameter, and back.

A checkpoint then has the same entries as with any other dense part. DeepSpeed has public functions for the values of
one parameter's float32 weights, but for optimizer state only after a first step. So state goes through the weights: a
partition of weights is replaced by a partition of state for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["ZeroState"]


class ZeroState:
    """Translates between partitions and parameters. All methods but `forget` are collective.

    Args:
        zero: DeepSpeed's engine.
        optimizer: the caller's optimizer.
        own: DeepSpeed's optimizer: each group has one parameter, this rank's partition.
        parameters: all dense parameters by name.
    """

    def __init__(self, zero: Any, optimizer: Optimizer, own: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self._zero, self._optimizer, self.own = zero, optimizer, own
        self._parameters = dict(parameters)
        trained = {p for p in parameters.values() if p.requires_grad}
        groups = [[p for p in group["params"] if p in trained] for group in optimizer.param_groups]
        self._groups = [group for group in groups if group]

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """float32 values of the parameters that have another dtype."""
        coarse = [p for p in self._parameters.values() if p.is_floating_point() and p.dtype != torch.float32]
        return {p: safe_get_full_fp32_param(p) if p.requires_grad else p.detach().float() for p in coarse}

    def took_weights(self, masters: Mapping[nn.Parameter, Tensor]) -> None:
        """Set DeepSpeed's master weights to those of the model, or to `masters`, which are exacter."""
        for parameter, value in masters.items():
            parameter.data.copy_(value)
        self._zero.optimizer.refresh_fp32_params()
        for parameter, value in masters.items():
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value)

    def give(self, optimizer: Optimizer) -> None:
        """Put the whole state of each dense parameter into `optimizer.state`."""
        self._check(optimizer)
        for parameters, flat, state in self._partitions():
            for key, value in state.items():
                if not isinstance(value, Tensor) or not value.ndim:
                    whole = dict.fromkeys(parameters, value)
                elif value.shape == flat.shape:
                    whole = self._whole(parameters, flat, value)
                else:
                    raise ValueError(
                        f"dense='deepspeed': optimizer state {key!r} has shape {tuple(value.shape)} for a partition of "
                        f"{flat.numel()} elements; only state with a value per element can be saved"
                    )
                for parameter, own in whole.items():
                    optimizer.state.setdefault(parameter, {})[key] = own

    def take(self, optimizer: Optimizer) -> None:
        """Move the state of dense parameters from `optimizer.state` to DeepSpeed's optimizer.

        Raises:
            ValueError: parameters of one group that were updated a different number of times.
        """
        self._check(optimizer)
        for parameters, flat, state in self._partitions():
            loaded = {p: optimizer.state.pop(p, {}) for p in parameters}
            state.clear()
            for key in dict.fromkeys(key for values in loaded.values() for key in values):
                values = {p: own[key] for p, own in loaded.items() if key in own}
                first = next(iter(values.values()))
                if isinstance(first, Tensor) and first.ndim:
                    state[key] = self._flat(parameters, flat, values)
                else:
                    state[key] = self._common(key, parameters, values)

    def forget(self, optimizer: Optimizer) -> None:
        """Undo `give`."""
        for group in self._groups:
            for parameter in group:
                optimizer.state.pop(parameter, None)

    def _partitions(self) -> Iterator[tuple[list[nn.Parameter], Tensor, dict[str, Any]]]:
        """Per group: its parameters, this rank's partition of their weights, and the partition's optimizer state."""
        for parameters, group in zip(self._groups, self.own.param_groups, strict=True):
            (flat,) = group["params"]
            yield parameters, flat, self.own.state[flat]

    def _whole(self, parameters: list[nn.Parameter], flat: Tensor, values: Tensor) -> dict[nn.Parameter, Tensor]:
        weights = flat.detach().clone()
        flat.data.copy_(values)
        whole = {p: safe_get_full_fp32_param(p) for p in parameters}
        flat.data.copy_(weights)
        return whole

    def _flat(self, parameters: list[nn.Parameter], flat: Tensor, values: Mapping[nn.Parameter, Tensor]) -> Tensor:
        weights = flat.detach().clone()
        for parameter in parameters:
            value = values.get(parameter)
            safe_set_full_fp32_param(parameter, torch.zeros_like(parameter) if value is None else value)
        state = flat.detach().clone()
        flat.data.copy_(weights)
        return state

    def _common(self, key: str, parameters: list[nn.Parameter], values: Mapping[nn.Parameter, Any]) -> Any:
        names = {p: name for name, p in self._parameters.items()}
        first = values.get(parameters[0])
        for parameter in parameters:
            if values.get(parameter) != first:
                raise ValueError(
                    f"dense='deepspeed': optimizer state {key!r} is {first} for {names[parameters[0]]} and "
                    f"{values.get(parameter)} for {names[parameter]}; DeepSpeed keeps one value for a parameter group"
                )
        return first

    def _check(self, optimizer: Optimizer) -> None:
        if optimizer is not self._optimizer:
            raise ValueError(
                "dense='deepspeed': pass the optimizer that hecate.integrations.deepspeed.initialize was given, whose "
                "dense state DeepSpeed has"
            )
