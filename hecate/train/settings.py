"""The settings of a run as frozen dataclasses, made from Hydra's configuration and validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import hecate
from hecate.config import FSSDPConfig
from hecate.models import BertMoE, GPTMoE, ModelConfig, TransformerMoE

__all__ = ["DataSettings", "OptimizerSettings", "Settings", "ValidationSettings", "conf_dir"]

MODELS: Mapping[str, type[TransformerMoE]] = {"gpt": GPTMoE, "bert": BertMoE}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def conf_dir() -> Path:
    """The folder of the Hydra configuration: inside the installed package, or beside it in a source tree."""
    package = Path(hecate.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {package} or {package.parent}: the installation is incomplete")


@dataclass(frozen=True)
class DataSettings:
    """Where tokens come from.

    Attributes:
        path: a folder of text, one text file, or a `.bin` file of tokens; None is Python's standard library.
        dtype: numpy name of a `.bin` file's tokens, such as "uint16"; None for text.
        validation_share: share of the files (of the tokens, if there is only one file) kept for validation.
        bytes_per_token: mean bytes of text per token; 1 for text, None if unknown.
    """

    path: str | None
    dtype: str | None
    validation_share: float
    bytes_per_token: float | None


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up over `warmup` steps and a cosine to `final_lr_share * lr`."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: int
    final_lr_share: float
    max_grad_norm: float


@dataclass(frozen=True)
class ValidationSettings:
    """Validation on `sequences` evenly spaced sequences, at the end and every `interval` steps (0: only at the end)."""

    sequences: int
    interval: int


@dataclass(frozen=True)
class Settings:
    """All settings of a run. `batch_size` is in sequences per device and micro-batch."""

    name: str
    output: str
    resume: bool
    steps: int
    seed: int
    devices: int
    device: str
    threads: int
    timeout_seconds: float
    batch_size: int
    sequence_length: int
    accumulate: int
    save_interval: int
    save_keep: int
    save_async: bool
    on_non_finite: str
    max_skipped: int
    requeue_exit_code: int
    trace: bool
    kind: str
    model: ModelConfig
    data: DataSettings
    optimizer: OptimizerSettings
    validation: ValidationSettings
    logger: Mapping[str, Any]
    fssdp: FSSDPConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Read the resolved configuration (plain dicts, lists and numbers); ValueError names invalid values."""
        model = dict(config["model"])
        kind = model.pop("kind")
        if kind not in MODELS:
            raise ValueError(f"model.kind={kind!r}: must be one of {', '.join(MODELS)}")
        optimizer = dict(config["optimizer"])
        optimizer["betas"] = tuple(optimizer["betas"])
        plain = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        plain.update(
            kind=kind,
            model=_record(ModelConfig, "model", model),
            data=_record(DataSettings, "data", config["data"]),
            optimizer=_record(OptimizerSettings, "optimizer", optimizer),
            validation=_record(ValidationSettings, "validation", config["validation"]),
            fssdp=_fssdp(config["fssdp"]),
        )
        return cls(**plain)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r}: must be the plain name of a folder, and no number")
        for name in ("steps", "devices", "threads", "batch_size", "sequence_length", "accumulate", "save_keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be an integer >= 1")
        for name in ("seed", "save_interval", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= 0")
        if self.on_non_finite not in ("skip", "stop"):
            raise ValueError(f"on_non_finite={self.on_non_finite!r}: must be one of skip, stop")
        # Python itself exits with 1 or 2; shells use codes from 128 on for signals.
        if not 3 <= self.requeue_exit_code <= 127:
            raise ValueError(f"requeue_exit_code={self.requeue_exit_code}: must be in [3, 127]")
        if self.sequence_length > self.model.max_length:
            raise ValueError(
                f"sequence_length={self.sequence_length}: must be <= model.max_length={self.model.max_length}"
            )
        if self.model.top_k > self.model.num_experts:
            raise ValueError(f"model.top_k={self.model.top_k}: must be <= model.num_experts={self.model.num_experts}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: must be one of auto, cpu, cuda")
        if not 0 < self.data.validation_share < 1:
            raise ValueError(f"data.validation_share={self.data.validation_share}: must be in (0, 1)")

    @property
    def folder(self) -> Path:
        """Folder of the run's files."""
        return Path(self.output) / self.name

    @property
    def token_limit(self) -> int:
        """Exclusive upper bound of the token ids in the data; BERT-MoE reserves its last id for the mask."""
        return self.model.vocab_size - (self.kind == "bert")

    def build_model(self, device: torch.device) -> TransformerMoE:
        """The model with its initial values on `device`, not yet sharded."""
        with torch.device("meta"):
            model = MODELS[self.kind](self.model)
        model.to_empty(device=device)
        model.init_weights(self.seed)
        return model


def _record(kind: Any, section: str, values: Mapping[str, Any]) -> Any:
    """`kind(**values)`; ValueError that lists the valid keys if `values` has an unknown key or lacks one."""
    valid = {f.name for f in fields(kind)}
    if set(values) != valid:
        wrong = sorted(set(values) ^ valid)
        raise ValueError(f"{section}: {', '.join(wrong)} unknown or missing; the keys are {', '.join(sorted(valid))}")
    return kind(**values)


def _fssdp(section: Mapping[str, Any]) -> FSSDPConfig:
    values = dict(section)
    for name in ("master_dtype", "param_dtype", "reduce_dtype", "wire_dtype"):
        if values[name] is not None:
            if values[name] not in DTYPES:
                raise ValueError(f"fssdp.{name}={values[name]!r}: must be null or one of {', '.join(DTYPES)}")
            values[name] = DTYPES[values[name]]
    return _record(FSSDPConfig, "fssdp", values)
