"""transformers' Trainer, and trainers that derive from it (TRL's), for a model under FSSDP.

The Trainer would wrap the model in DistributedDataParallel, save the optimizer state of one rank only, and read whole
checkpoints into every rank. The mixin replaces these parts:

    class MyTrainer(FSSDPTrainerMixin, SFTTrainer): ...
    trainer = MyTrainer(hecate.fully_shard(model), args=args, train_dataset=data)

`resume_from_checkpoint` continues bit-identically on the same number of devices, and works on any other number. TRL's
`DPOTrainer` needs a `ref_model`, since it cannot copy the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hecate.api import FSSDP
from hecate.ranks.agree import agree

__all__ = ["STATE", "FSSDPTrainer", "FSSDPTrainerMixin"]

STATE = "fssdp"
"""Folder of `FSSDP.save` inside each of the Trainer's checkpoints: weights, optimizer state and load history."""
SCHEDULER = "scheduler.pt"
"""The Trainer's own name for the state of the learning rate scheduler."""


class FSSDPTrainerMixin:
    """Put it before a trainer class. Saving, loading and evaluation are collective, as training is.

    Args:
        engine: result of `hecate.fully_shard`, with initialized parameters.
        kwargs: arguments of the trainer class, without `model`.
    """

    accelerator: Any
    args: Any
    lr_scheduler: Any
    optimizer: Any
    state: Any

    def __init__(self, engine: FSSDP, **kwargs: Any) -> None:
        self.engine = engine
        super().__init__(model=engine.model, **kwargs)  # type: ignore[call-arg]

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator as usual, but keep it from wrapping the model, and clip gradients with the engine."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        prepare = self.accelerator.prepare_model

        def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            if model is not self.engine.model:  # e.g. a reference model, which is not trained
                return prepare(model, *args, **kwargs)
            return prepare(model, device_placement=False, evaluation_mode=True)

        def clip_grad_norm_(parameters: object, max_norm: float, norm_type: float = 2) -> Tensor:
            return self.engine.clip_grad_norm_(max_norm)

        self.accelerator.prepare_model = prepare_model
        self.accelerator.clip_grad_norm_ = clip_grad_norm_

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save in the format that `from_pretrained` loads."""
        self.engine.save_pretrained(str(output_dir or self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.engine.save(Path(output_dir) / STATE, _plain(self.optimizer), extra={"step": self.state.global_step})
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Before the optimizer is made: only check; `_load_optimizer_and_scheduler` reads all at once."""
        if not (Path(resume_from_checkpoint) / STATE).is_dir():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint}: has no folder {STATE!r}; it must be a checkpoint "
                "that this trainer wrote with save_only_model=False"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.engine.load(Path(checkpoint) / STATE, _plain(self.optimizer))
        state = agree(lambda: torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        self.lr_scheduler.load_state_dict(state)

    def _load_best_model(self) -> None:
        """At the end of training, with `load_best_model_at_end`."""
        self.engine.load_pretrained(self.state.best_model_checkpoint)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class FSSDPTrainer(FSSDPTrainerMixin, Trainer):
    """transformers' Trainer for a model under FSSDP."""
