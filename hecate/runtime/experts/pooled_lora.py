"""peft's wrappers of experts that are in a pool: they say which adapters run, and merge those of the owned experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hecate.adapters.peft import Lora
from hecate.ranks.agree import agree

__all__ = ["pass_through"]

Wrapper: Any = object
"""Stands for peft's `ParamWrapper`, the other base class of what `pass_through` makes; peft need not be there."""


class PooledLora(Wrapper):
    """A `ParamWrapper` whose matrices, and the weights that it adapts, are in a pool.

    It only says which adapters are active; `LoraMLP` adds them. Merging changes the weights of the owned experts.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module."""
        self._check_forward_args(x, *args, **kwargs)  # peft's: ValueError for batches of mixed adapters
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.base_layer(x, *args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weights of the owned experts. Collective if `safe_merge`.

        Args:
            safe_merge: do nothing, with a ValueError on all ranks, if a weight would not be finite.
            adapter_names: the adapters; None: the active ones.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_A:
                weight, delta = self._delta(adapter)
                if safe_merge:
                    agree(partial(_check_finite, adapter, weight + delta))
                weight.add_(delta)
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters again."""
        while self.merged_adapters:
            weight, delta = self._delta(self.merged_adapters.pop())
            weight.sub_(delta)

    def _delta(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The owned rows of the adapted weight, and what the adapter adds to them."""
        lora = Lora.of(self, adapter)
        low = lora.added_to(self.get_base_layer().owned_weights())
        assert isinstance(low.weight, Tensor)
        return low.weight, (low.left @ low.right * low.scale).to(low.weight.dtype)

    # peft changes `requires_grad` of parameters, which the modules of the matrices do not have any more.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use these adapters, and train only them, or none of them with `inference_mode`."""
        super().set_adapter(adapter_names, inference_mode)
        for adapter in self.lora_A:
            self._train(adapter, adapter in self.active_adapters and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Use and train the adapters, or not."""
        super().enable_adapters(enabled)
        for adapter in () if enabled else self.lora_A:
            self._train(adapter, False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters or not."""
        super().set_requires_grad(adapter_names, requires_grad)
        for adapter in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if adapter in self.lora_A:
                self._train(adapter, requires_grad)

    def _train(self, adapter: str, requires_grad: bool) -> None:
        for matrices in (self.lora_A, self.lora_B):
            matrices[adapter].requires_grad_(requires_grad)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Always RuntimeError."""
        self._refuse_change(f"adapter {adapter_name!r} cannot be added")

    def delete_adapter(self, adapter_name: str) -> None:
        """Always RuntimeError."""
        self._refuse_change(f"adapter {adapter_name!r} cannot be deleted")

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> None:
        """Always RuntimeError."""
        self._refuse_change("adapters cannot be unloaded")

    def _refuse_change(self, what: str) -> None:
        raise RuntimeError(
            f"fully_shard: after it, {what}; save the adapters with model.save_pretrained, and change them on the "
            "model before hecate.fully_shard"
        )


def _check_finite(adapter: str, merged: Tensor) -> None:
    if not bool(torch.isfinite(merged).all()):
        raise ValueError(f"merge: weights would not be finite with adapter {adapter!r}")


def pass_through(wrappers: Iterable[nn.Module]) -> None:
    """Change the class of peft's wrappers in place, when their weights are in a pool."""
    for wrapper in wrappers:
        own = type(wrapper)
        # Under peft's name for it, by which peft finds its wrappers.
        wrapper.__class__ = type(own.__name__, (PooledLora, own), {})
