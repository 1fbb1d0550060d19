"""The models that a run can train: Hecate's own, one from a folder of transformers, or one of the user.

A batch is int64 tokens `[B, S + 1]`, from text or a token file, or what the user's data gives. The user's model is
called as `hecate.verify` calls it: a mapping becomes keywords, a tuple positional arguments, else the batch is the one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hecate.api import FSSDP
from hecate.models import ModelConfig, mask_tokens
from hecate.models.transformer import IGNORE, cross_entropy
from hecate.train.settings import DTYPES, MODELS, FolderSettings, Settings
from hecate.train.target import Target
from hecate.values.initialize import on_meta
from hecate.verify.command import shrunk
from hecate.verify.task import call_with, loss_of, moved

__all__ = ["Losses", "TrainedModel", "trained_model"]


class Losses(NamedTuple):
    """Losses of one batch.

    Attributes:
        loss: the scalar to differentiate.
        lm_loss: mean cross entropy in nats over the predicted tokens; of a model that does not tell, `loss`.
        predicted: number of predicted tokens; of batches without labels, of items.
    """

    loss: Tensor
    lm_loss: Tensor
    predicted: int


class TrainedModel(Protocol):
    """How one kind of model is made and called."""

    @property
    def token_limit(self) -> int | None:
        """Exclusive upper bound of the token ids in the data; None if unknown."""

    def build(self, device: torch.device) -> nn.Module:
        """The model, not sharded yet: with its initial values on `device`, or on the meta device."""

    def fill(self, engine: FSSDP) -> None:
        """Give a model that was built on the meta device its initial values. Collective."""

    def losses(self, call: nn.Module, batch: Any, seed: int, device: torch.device) -> Losses:
        """Run `call`, the model or what DeepSpeed put around it, on a batch; `seed` is for random masks."""


def trained_model(settings: Settings) -> TrainedModel:
    """The model that the settings name."""
    if isinstance(settings.model, ModelConfig):
        return OwnModel(settings.kind, settings.model, settings.seed)
    if isinstance(settings.model, FolderSettings):
        return FolderModel(settings.model, settings.seed)
    return UserModel(settings.model, settings.seed)


@dataclass(frozen=True)
class OwnModel:
    """A GPT-MoE or BERT-MoE."""

    kind: str
    config: ModelConfig
    seed: int

    @property
    def token_limit(self) -> int:
        """BERT-MoE reserves its last id for the mask."""
        return self.config.vocab_size - (self.kind == "bert")

    def build(self, device: torch.device) -> nn.Module:
        """With its initial values on `device`."""
        with torch.device("meta"):
            model = MODELS[self.kind](self.config)
        model.to_empty(device=device)
        model.init_weights(self.seed)
        return model

    def fill(self, engine: FSSDP) -> None:
        """Nothing to do: `build` does it."""

    def losses(self, call: nn.Module, batch: Tensor, seed: int, device: torch.device) -> Losses:
        """Of next tokens, or of masked ones."""
        if self.kind == "gpt":
            inputs, targets = batch[:, :-1], batch[:, 1:]
        else:
            inputs, targets = mask_tokens(batch[:, :-1], self.config.vocab_size, torch.Generator().manual_seed(seed))
        output = call(inputs.to(device), targets.to(device))
        return Losses(output.loss, output.lm_loss, int((targets != IGNORE).sum()))


class FolderModel:
    """A causal language model of transformers, built on the meta device; each rank reads only what it owns."""

    def __init__(self, settings: FolderSettings, seed: int) -> None:
        try:
            from transformers import AutoConfig
        except ImportError as error:
            raise ValueError("model=hf needs transformers; install hecate-moe[hf]") from error
        self._settings, self._seed = settings, seed
        self._config, _ = shrunk(AutoConfig.from_pretrained(settings.path), settings.config)
        self.token_limit: int | None = self._config.get_text_config().vocab_size

    def build(self, device: torch.device) -> nn.Module:
        """On the meta device."""
        from transformers import AutoModelForCausalLM

        settings = self._settings
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self._config, dtype=DTYPES[settings.dtype])
        model.config.use_cache = False
        if settings.checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made: nn.Module = model.train()
        return made

    def fill(self, engine: FSSDP) -> None:
        """Read the weights of the folder, or draw new ones."""
        if self._settings.has_weights:
            engine.load_pretrained(self._settings.path)
        else:
            engine.init_weights(self._seed)

    def losses(self, call: nn.Module, batch: Any, seed: int, device: torch.device) -> Losses:
        """Of next tokens; transformers' models shift the labels themselves."""
        return _losses(call, _labelled(batch) if isinstance(batch, Tensor) else batch, device)


class UserModel:
    """A model made by a function or class of the user; called with `(tokens, targets)` or with the user's batches."""

    token_limit: int | None = None

    def __init__(self, target: Target, seed: int) -> None:
        self._target, self._seed = target, seed
        self._labels = False  # whether it is a model of transformers
        self._meta = False

    def build(self, device: torch.device) -> nn.Module:
        """What the user's function returns; ValueError if that is no module."""
        torch.manual_seed(self._seed)  # the same values on all ranks
        model = self._target.make()
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model._target_={self._target.path!r}: returned {type(model).__name__}; must be a torch.nn.Module"
            )
        self._meta = bool(on_meta(model))
        self._labels = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
        return model if self._meta else model.to(device)

    def fill(self, engine: FSSDP) -> None:
        """By the model's own rules, if it was built on the meta device."""
        if self._meta:
            engine.init_weights(self._seed)

    def losses(self, call: nn.Module, batch: Any, seed: int, device: torch.device) -> Losses:
        """Of tokens: called with `(tokens, targets)`, both `[B, S]`; as in `FolderModel` if it is of transformers."""
        if isinstance(batch, Tensor):
            batch = _labelled(batch) if self._labels else (batch[:, :-1], batch[:, 1:])
        return _losses(call, batch, device)


def _labelled(tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, :-1]}


def _losses(call: nn.Module, batch: Any, device: torch.device) -> Losses:
    """Losses of what `call` returns for a batch: `.loss`, `["loss"]` or the output itself."""
    placed = moved(batch, device)
    output = call_with(call, placed)
    loss = loss_of(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"the model returned {type(loss).__name__}; must be a scalar, or have one as .loss or ['loss']"
        )
    return Losses(loss.reshape(()), *_of_tokens(output, batch, loss.detach().reshape(())))


@torch.no_grad()
def _of_tokens(output: Any, batch: Any, loss: Tensor) -> tuple[Tensor, int]:
    """Cross entropy without auxiliary losses, as far as it is known, and the number of predictions."""
    own = getattr(output, "lm_loss", None)
    if isinstance(batch, Mapping) and isinstance(labels := batch.get("labels"), Tensor) and labels.dim() > 1:
        predicted = int((labels[:, 1:] != IGNORE).sum())
        if own is None and getattr(output, "aux_loss", None) is not None:
            own = cross_entropy(output.logits[:, :-1], labels[:, 1:].to(loss.device))
    else:
        first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
        items = first[0] if isinstance(first, tuple | list) else first
        targets: Any = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
        tokens = isinstance(targets, Tensor) and targets.dtype == torch.int64
        predicted = int((targets != IGNORE).sum()) if tokens else len(items)
    return loss if own is None else own.detach(), predicted
