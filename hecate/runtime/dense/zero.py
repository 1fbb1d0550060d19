"""The dense part trained by DeepSpeed's engine (ZeRO-1 or ZeRO-2), through its public calls.

DeepSpeed sees only the dense parameters; `hecate.integrations.deepspeed.initialize` makes its engine. DeepSpeed reduces
their gradients during backward and keeps them out of `.grad`; its optimizer steps when that of the experts does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.private_torch import in_backward
from hecate.runtime.dense.base import Dense
from hecate.runtime.dense.zero_state import ZeroState

__all__ = ["ZeroDense"]

INITIALIZE = "hecate.integrations.deepspeed.initialize"


class ZeroDense(Dense):
    """Watches over the passes of DeepSpeed's engine. Without one (before `connect`) the model only evaluates.

    What DeepSpeed would compute wrongly or lose without a word raises RuntimeError: forward passes of the model itself,
    several forward passes before a backward pass, changed `requires_grad`, and steps of DeepSpeed's engine alone.

    Args:
        parameters: all dense parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._zero: Any = None  # DeepSpeed's engine
        self._state: ZeroState | None = None
        self._trained: dict[str, bool] = {}
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._experts: list[nn.Parameter] = []
        self._calling = False  # whether DeepSpeed's engine calls the model
        self._open = False  # whether a forward pass waits for its backward pass
        self._unreduced = False  # whether there are gradients that were not reduced
        self._ready = False  # whether there are reduced gradients
        self._stepping = False
        self._broken = False

    @property
    def connected(self) -> bool:
        """Whether DeepSpeed's engine was made."""
        return self._zero is not None

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """DeepSpeed's optimizer."""
        return () if self._state is None else (self._state.own,)

    def connect(self, zero: Any, optimizer: Optimizer, own: Optimizer, groups: Sequence[tuple[Any, Any]]) -> None:
        """Train with DeepSpeed's engine `zero` from now on.

        Args:
            zero: made with the dense parameters alone.
            optimizer: the caller's optimizer, of all parameters; its step is that of both.
            own: the optimizer that `zero` was made with.
            groups: pairs of a group of `optimizer` and the one of `own` with its dense parameters.
        """
        self._zero, self._groups = zero, list(groups)
        self._state = ZeroState(zero, optimizer, own, self._parameters)
        self._trained = {name: p.requires_grad for name, p in self._parameters.items()}
        dense = set(self._parameters.values())
        self._experts = [p for group in optimizer.param_groups for p in group["params"] if p not in dense]
        zero.set_gradient_accumulation_boundary(self.sync)
        zero.register_forward_pre_hook(lambda module, args: self._call(True))
        zero.register_forward_hook(lambda module, args, output: self._call(False), always_call=True)
        optimizer.register_step_pre_hook(self._step)
        own.register_step_pre_hook(lambda optimizer, args, kwargs: self._check_step())

    # Passes.

    def set_sync(self, sync: bool) -> None:
        """Set whether the next backward pass ends the accumulation of gradients."""
        super().set_sync(sync)
        if self._zero is not None:
            self._zero.set_gradient_accumulation_boundary(sync)

    def enter(self) -> None:
        """Check that DeepSpeed is prepared for the backward pass that may follow.

        Raises:
            RuntimeError: it is not; the message says what to call.
        """
        if in_backward() or not torch.is_grad_enabled():
            return
        if self._zero is None:
            raise RuntimeError(f"dense='deepspeed': call {INITIALIZE} before the first training step")
        if self._broken:
            raise RuntimeError(
                "dense='deepspeed': a backward pass raised, and DeepSpeed cannot drop what it left; start again from a "
                "checkpoint"
            )
        if not self._calling:
            raise RuntimeError(
                f"dense='deepspeed': call what {INITIALIZE} returned, not the model, so that DeepSpeed reduces the "
                "gradients; the model itself only under torch.no_grad()"
            )
        if self._open:
            raise RuntimeError(
                "dense='deepspeed': the last forward pass had no backward pass yet; DeepSpeed takes one micro-batch "
                "after the other: call backward(), or engine.skip_step(), or evaluate under torch.no_grad()"
            )
        self._check_trained()
        self._open = True

    def leave(self) -> None:
        """Nothing to do: the modules always hold the parameters."""

    def await_gradients(self) -> None:
        """A backward pass begins, in which DeepSpeed's hooks reduce gradients."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: DeepSpeed reduces first gradients only; set dense='replicate'")
        super().await_gradients()

    def reduce(self) -> None:
        """Note that a backward pass has ended; DeepSpeed reduces what is left when its own hooks have run."""
        self._open = self.awaited = False
        self._unreduced = not self.sync
        self._ready |= self.sync

    def drop(self) -> None:
        """Drop gradients, as DeepSpeed does where they overflow."""
        self._broken |= self.awaited
        self._open = self.awaited = self._unreduced = self._ready = False
        if self._zero is None:
            return
        self._unscale()
        zero = self._zero.optimizer
        zero.zero_grad()
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))

    # Gradients and steps.

    def gradient_norm(self) -> Tensor | None:
        """Norm of the reduced gradients, NaN if it is not finite; the same on all ranks. Collective."""
        if not self._ready:
            return None
        norm = torch.as_tensor(self._zero.optimizer.scaled_global_norm())
        return torch.where(norm.isfinite() & (norm >= 0), norm, torch.nan)  # DeepSpeed says -1 or inf

    def scale_gradients(self, factor: Tensor) -> None:
        """Let DeepSpeed multiply the gradients by `factor` when it steps; waits for the device."""
        if self._ready and (value := float(factor)) < 1:
            self._zero.optimizer.override_loss_scale(1 / value)  # by which the step divides

    def _unscale(self) -> None:
        """End what `override_loss_scale` began; losses of the next step must not be multiplied by it."""
        self._zero.optimizer.custom_loss_scaler = False

    def _step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before each step of the caller's optimizer: step DeepSpeed's, with the same settings."""
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise ValueError("dense='deepspeed': DeepSpeed takes no closure; call optimizer.step() without one")
        if self._unreduced:
            raise RuntimeError(
                "dense='deepspeed': the last backward pass before optimizer.step() must be outside of no_sync()"
            )
        if not self._ready:
            return
        for group, own in self._groups:
            own.update({key: value for key, value in group.items() if key in own and key != "params"})
        self._stepping, self._ready = True, False
        try:
            self._zero.step()
        finally:
            self._stepping = False
            self._unscale()
        if not self._zero.was_step_applied():  # the gradients were not finite: the experts' step is skipped too
            for parameter in self._experts:
                parameter.grad = None

    def _check_step(self) -> None:
        if not self._stepping:
            raise RuntimeError(
                "dense='deepspeed': call optimizer.step() of the optimizer that was passed to "
                f"{INITIALIZE}, which steps DeepSpeed's engine too; the engine's own step() would leave out the experts"
            )

    def _check_trained(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad != self._trained[name]:
                raise RuntimeError(
                    f"dense='deepspeed': requires_grad of {name} is {parameter.requires_grad}, it was "
                    f"{self._trained[name]} in {INITIALIZE}, where DeepSpeed chose what it trains; set it before"
                )

    def _call(self, calling: bool) -> None:
        self._calling = calling

    # Weights and state.

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """float32 copies of the parameters that are coarser: whole tensors, which `took_weights` takes. Collective."""
        return {} if self._state is None else self._state.masters()

    def took_weights(self, masters: Mapping[nn.Parameter, Tensor] | None = None) -> None:
        """Parameters, or `masters`, have new values: DeepSpeed's master weights become these; drop gradients."""
        if self._state is not None:
            self.drop()
            self._state.took_weights(masters or {})

    @contextmanager
    def with_state(self, optimizer: Optimizer | None) -> Iterator[None]:
        """Inside, `optimizer.state` has that of the dense part, as whole tensors. Collective."""
        if self._state is None or optimizer is None:
            yield
            return
        self._state.give(optimizer)
        try:
            yield
        finally:
            self._state.forget(optimizer)

    def took_state(self, optimizer: Optimizer) -> None:
        """`optimizer.state` has been loaded: move what belongs to the dense part to DeepSpeed's optimizer."""
        if self._state is not None:
            self._state.take(optimizer)
