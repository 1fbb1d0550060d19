"""The experts module of one MoE layer under FSSDP.

Shapes: T tokens of this device, k experts per token, d model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hecate.experts import ExpertsSpec
from hecate.runtime.experts.module import ExpertsModule, WeightModule
from hecate.runtime.step.engine import Engine
from hecate.runtime.step.run import run

__all__ = ["FSSDPExperts"]


class FSSDPExperts(ExpertsModule):
    """An experts module under FSSDP. Its stacked weights are in the engine's pool; all else stays in the module."""

    @staticmethod
    def take_over(module: nn.Module, index: int, spec: ExpertsSpec) -> FSSDPExperts:
        """Change the class of `module`, and of modules with other weights of its experts; see `ExpertsModule.take`."""
        kinds = {name: name for name, _ in module.named_parameters(recurse=False)}  # in the order of the state dict
        for kind, place in spec.elsewhere.items():
            WeightModule.take(place.module, index, spec, {place.attribute: kind})
        return FSSDPExperts.take(module, index, spec, kinds)

    def connect(self, engine: Engine) -> None:
        """Set the engine that `forward` uses, and the experts that state dicts are made from."""
        experts = engine.layers[self.hecate_index].experts
        self.keep(experts)
        for place in self.hecate_spec.elsewhere.values():
            assert isinstance(place.module, WeightModule)
            place.module.keep(experts)
        # In a list, so that nn.Module does not look into it: the engine refers to the model.
        self._hecate_engine = [engine]

    def disconnect(self) -> None:
        """Let go of the engine; `forward` raises from now on."""
        self._hecate_engine = []

    _hecate_engine: list[Engine]

    # The sizes of collectives depend on token counts that the host must read, so torch.compile breaks its graph here.
    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted outputs of each token's experts.

        Args:
            hidden_states: `[T, d]`.
            top_k_index: integers `[T, k]`, the experts of each token; -1: none, so a token may have any number up to
                k.
            top_k_weights: `[T, k]`, their weights.

        Returns:
            `[T, d]` in the dtype of `hidden_states`. Experts compute in `param_dtype`, even under autocast.

        Raises:
            ValueError: under autocast with float16, or tensors of other shapes or kinds than these.
            RuntimeError: `FSSDP.close` was called.
        """
        if not self._hecate_engine:
            raise RuntimeError(f"{self.hecate_spec.name}: FSSDP.close() was called; the model cannot run any more")
        engine = self._hecate_engine[0]
        _check_autocast(self.hecate_spec.name, hidden_states.device.type)
        _check_shapes(self.hecate_spec.name, hidden_states, top_k_index, top_k_weights)
        chosen = (top_k_index.long().contiguous(), top_k_weights.contiguous())
        with engine.comms.guard():
            return run(engine.passes, self.hecate_index, self.hecate_spec, hidden_states, *chosen)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        spec = self.hecate_spec
        return f"num_experts={spec.num_experts}, {', '.join(f'{w.kind}{list(w.shape)}' for w in spec.weights)}"


def _check_autocast(layer: str, kind: str) -> None:
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        raise ValueError(
            f"{layer}: autocast with torch.float16 needs a loss scaler that knows of all ranks; use torch.bfloat16"
        )


def _check_shapes(layer: str, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    if hidden.ndim != 2 or index.ndim != 2 or len(hidden) != len(index) or not index.shape[1]:
        raise ValueError(
            f"{layer} was called with hidden_states {list(hidden.shape)} and top_k_index {list(index.shape)}; must be "
            "[tokens, width] and [tokens, k], k > 0"
        )
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{layer}: top_k_index is {index.dtype}; must be the integer ids of experts")
    if index.shape != weights.shape:
        raise ValueError(
            f"{layer}: the router gave top_k_index {list(index.shape)} and top_k_weights {list(weights.shape)}; must "
            "both be [tokens, k] (hunyuan_v1_moe's in transformers 5.0 gives a weight per expert: use a newer version)"
        )
