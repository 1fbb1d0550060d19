"""The settings of a run as frozen dataclasses, made from Hydra's configuration and validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hecate.carried import carried
from hecate.config import FSSDPConfig
from hecate.models import BertMoE, GPTMoE, ModelConfig, TransformerMoE
from hecate.train.profiling import ProfileSteps
from hecate.train.target import TARGET, Target
from hecate.train.typed import check_types

__all__ = ["DataSettings", "FolderSettings", "OptimizerSettings", "Settings", "ValidationSettings", "conf_dir"]

MODELS: Mapping[str, type[TransformerMoE]] = {"gpt": GPTMoE, "bert": BertMoE}
FOLDER, OWN = "hf", "own"
"""Kinds of models besides `MODELS`: from a folder of transformers, and of the user."""
SECTIONS = ("model", "data", "optimizer", "validation", "logger", "fssdp")
OUTSIDE = {"policy", "dense"}
"""Keys that only stand for others, which refer to them."""
BYTES = "bytes"
"""Instead of a tokenizer: a byte is a token."""
LOGGERS = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb"}
"""Kind of logger -> the package that it needs."""
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def conf_dir() -> Path:
    """The folder of the Hydra configuration: inside the installed package, or beside it in a source tree."""
    return carried("conf/config.yaml").parent


@dataclass(frozen=True)
class DataSettings:
    """Where tokens come from.

    Attributes:
        kind: "text" or "tokens".
        path: a folder of text or one text file, or a file of tokens; None is the text of Python's standard library.
        dtype: numpy name of the tokens in a file without a header, such as "uint16"; None for text and `.npy` files.
        validation_share: share of the files (of the tokens, if there is only one file) kept for validation.
        bytes_per_token: mean bytes of text per token, if `path` is a file of tokens; None if unknown.
        tokenizer: for text: a folder with a tokenizer of transformers, or BYTES; None: that of the model's folder if it
            has one, else BYTES.
    """

    kind: str
    path: str | None
    dtype: str | None
    validation_share: float
    bytes_per_token: float | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class FolderSettings:
    """A causal language model of transformers.

    Attributes:
        path: a folder with a `config.json`, and perhaps weights and a tokenizer, or such a file.
        max_length: tokens of a sequence, if `sequence_length` is not set.
        config: values of its config to change, e.g. `num_hidden_layers`.
        random_weights: leave weights of the folder alone and draw new ones.
        dtype: dtype of the master weights.
        checkpoint: recompute activations in the backward pass.
    """

    path: str
    max_length: int
    config: Mapping[str, Any]
    random_weights: bool
    dtype: str
    checkpoint: bool

    def __post_init__(self) -> None:
        path = Path(self.path)
        if not (path / "config.json" if path.is_dir() else path).is_file():
            raise ValueError(f"model.path={self.path!r}: must be a folder with a config.json, or such a file")
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")

    @property
    def has_weights(self) -> bool:
        """Whether the run begins with the weights of the folder."""
        return not self.random_weights and any(Path(self.path).glob("*.safetensors*"))

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer."""
        return any((Path(self.path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, with linear warm-up over `warmup` steps and a cosine to `final_lr_share * lr`.

    Attributes:
        target: called with the model's parameters, after sharding, `lr` and its arguments.
    """

    target: Target
    lr: float
    warmup: int = 0
    final_lr_share: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("warmup", "final_lr_share"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: must be >= 0")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"optimizer.max_grad_norm={self.max_grad_norm}: must be > 0 (.inf: gradients stay as they are)"
            )

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> OptimizerSettings:
        """Read the section `optimizer`; what is not ours are arguments of its `_target_`."""
        own = {f.name for f in fields(cls)} - {"target"}
        if TARGET not in section:
            raise ValueError(f"optimizer: {TARGET} missing; e.g. torch.optim.AdamW")
        rest = {name: tuple(v) if isinstance(v, list) else v for name, v in section.items() if name not in own}
        check_types(_Usual, "optimizer.", {f.name: rest[f.name] for f in fields(_Usual) if f.name in rest})
        ours = {name: value for name, value in section.items() if name in own}
        check_types(cls, "optimizer.", ours)
        if "lr" not in ours:
            raise ValueError("optimizer: lr missing")
        return cls(Target.of("optimizer", rest), **ours)


@dataclass(frozen=True)
class _Usual:
    """Types of the arguments that many optimizers take."""

    betas: tuple[float, float]
    weight_decay: float
    momentum: float
    eps: float


@dataclass(frozen=True)
class ValidationSettings:
    """Validation on `sequences` evenly spaced sequences, at the end and every `interval` steps (0: only at the end)."""

    sequences: int
    interval: int

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"validation.sequences={self.sequences}: must be >= 1")
        if self.interval < 0:
            raise ValueError(f"validation.interval={self.interval}: must be >= 0 (0: only at the end)")


@dataclass(frozen=True)
class Settings:
    """All settings of a run. `batch_size` is in sequences per device and micro-batch."""

    name: str
    output: str
    overwrite: bool
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
    save_pretrained: bool
    on_non_finite: str
    max_skipped: int
    requeue_exit_code: int
    trace: bool
    report: bool
    profile: str | None
    kind: str
    model: ModelConfig | FolderSettings | Target
    deepspeed: str | None
    log_interval: int
    debug: bool
    peak_tflops: float | None
    data: DataSettings | Target
    optimizer: OptimizerSettings
    validation: ValidationSettings
    logger: Mapping[str, Any]
    fssdp: FSSDPConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Read the resolved configuration (plain dicts, lists and numbers); ValueError names invalid values."""
        _check_sections(config)
        kind, model = _model(config["model"])
        plain = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        plain.update(
            kind=kind,
            model=model,
            data=_data(config["data"], model),
            optimizer=OptimizerSettings.of(config["optimizer"]),
            validation=_record(ValidationSettings, "validation", config["validation"]),
            fssdp=_fssdp(config["fssdp"]),
        )
        check_types(cls, "", {name: value for name, value in plain.items() if name != "name"})  # it has its own rule
        return cls(**plain)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r}: must be the plain name of a folder, and no number")
        for name in (
            "steps",
            "devices",
            "threads",
            "batch_size",
            "sequence_length",
            "accumulate",
            "save_keep",
            "log_interval",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be an integer >= 1")
        for name in ("seed", "save_interval", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= 0")
        if self.on_non_finite not in ("skip", "stop"):
            raise ValueError(f"on_non_finite={self.on_non_finite!r}: must be one of skip, stop")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds={self.timeout_seconds}: must be > 0")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops={self.peak_tflops}: must be null or > 0")
        # Python itself exits with 1 or 2; shells use codes from 128 on for signals.
        if not 3 <= self.requeue_exit_code <= 127:
            raise ValueError(f"requeue_exit_code={self.requeue_exit_code}: must be in [3, 127]")
        self._check_model()
        self._check_logger()
        _ = self.profile_steps
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: must be one of auto, cpu, cuda")
        if self.deepspeed is not None and not Path(self.deepspeed).is_file():
            raise ValueError(f"deepspeed={self.deepspeed!r}: no such file; must be the JSON of a DeepSpeed config")
        if isinstance(self.data, DataSettings) and not 0 < self.data.validation_share < 1:
            raise ValueError(f"data.validation_share={self.data.validation_share}: must be in (0, 1)")
        if self.fssdp.dense == "none":
            raise ValueError(
                "dense='none': leaves the rest of the model to the caller, which the trainer is not; must be one of "
                "fsdp, replicate, deepspeed"
            )

    def _check_model(self) -> None:
        model = self.model
        if isinstance(model, ModelConfig) and self.sequence_length > model.max_length:
            raise ValueError(f"sequence_length={self.sequence_length}: must be <= model.max_length={model.max_length}")
        if isinstance(model, ModelConfig) and model.top_k > model.num_experts:
            raise ValueError(f"model.top_k={model.top_k}: must be <= model.num_experts={model.num_experts}")

    def _check_logger(self) -> None:
        kind = self.logger.get("kind")
        if kind not in LOGGERS:
            raise ValueError(f"logger.kind={kind!r}: must be one of {', '.join(LOGGERS)}")
        package = LOGGERS[kind]
        if package is not None and find_spec(package) is None:
            raise ValueError(f"logger.kind={kind!r}: {package} is not installed; install hecate-moe[train]")

    @property
    def folder(self) -> Path:
        """Folder of the run's files."""
        return Path(self.output) / self.name

    @property
    def profile_steps(self) -> ProfileSteps | None:
        """The steps to profile; ValueError if `profile` does not name any."""
        return None if self.profile is None else ProfileSteps.parse(self.profile, self.steps)

    @property
    def deepspeed_config(self) -> Path:
        """The JSON file of the DeepSpeed config."""
        return conf_dir() / "deepspeed.json" if self.deepspeed is None else Path(self.deepspeed)


def _model(section: Mapping[str, Any]) -> tuple[str, ModelConfig | FolderSettings | Target]:
    """The kind of model, and what describes it."""
    if TARGET in section:
        return OWN, Target.of("model", section)
    model = dict(section)
    kind = model.pop("kind", None)
    if kind == FOLDER:
        return kind, _record(FolderSettings, "model", model)
    if kind not in MODELS:
        raise ValueError(
            f"model.kind={kind!r}: must be one of {', '.join([*MODELS, FOLDER])}; or set model.{TARGET} to a function "
            "of your own"
        )
    return kind, _record(ModelConfig, "model", model)


def _data(section: Mapping[str, Any], model: ModelConfig | FolderSettings | Target) -> DataSettings | Target:
    if TARGET in section:
        return Target.of("data", section)
    data: DataSettings = _record(DataSettings, "data", section)
    if data.kind != "text" or data.tokenizer is not None or not isinstance(model, FolderSettings):
        return data
    if model.has_weights and not model.has_tokenizer:
        raise ValueError(
            f"data.tokenizer=null: {model.path} has weights but no tokenizer; set data.tokenizer to the folder of its "
            f"tokenizer, or to {BYTES}"
        )
    return replace(data, tokenizer=model.path if model.has_tokenizer else BYTES)


def _check_sections(config: Mapping[str, Any]) -> None:
    """ValueError for a key that no setting has (`+key=value` adds it), a missing key, or a value that is no section."""
    needed = {f.name for f in fields(Settings)} - {"kind"}
    if unknown := sorted(set(config) - needed - OUTSIDE):
        valid = ", ".join(sorted(needed | OUTSIDE))
        raise ValueError(f"key {unknown[0]!r} does not exist; there are the keys {valid}")
    if missing := sorted(needed - set(config)):
        raise ValueError(f"key {missing[0]!r} is missing; conf/config.yaml has its default")
    for name in SECTIONS:
        if not isinstance(config[name], Mapping):
            raise ValueError(f"{name}={config[name]!r}: must be a section, whose keys are set by {name}.KEY=VALUE")


def _record(kind: Any, section: str, values: Mapping[str, Any]) -> Any:
    """`kind(**values)`; ValueError that lists the valid keys if `values` has an unknown key or lacks one."""
    valid = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if wrong := sorted({*(set(values) - valid), *(needed - set(values))}):
        raise ValueError(f"{section}: {', '.join(wrong)} unknown or missing; the keys are {', '.join(sorted(valid))}")
    check_types(kind, f"{section}.", values)
    return kind(**values)


def _fssdp(section: Mapping[str, Any]) -> FSSDPConfig:
    values = dict(section)
    for name in ("master_dtype", "param_dtype", "reduce_dtype", "wire_dtype"):
        if values[name] is not None:
            if values[name] not in DTYPES:
                raise ValueError(f"fssdp.{name}={values[name]!r}: must be null or one of {', '.join(DTYPES)}")
            values[name] = DTYPES[values[name]]
    return _record(FSSDPConfig, "fssdp", values)
