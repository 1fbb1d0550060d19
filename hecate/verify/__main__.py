"""`python -m hecate.verify model=FOLDER [key=value ...]`, by itself or under torchrun: prints the report.

Exits with 0 if Hecate trains the model as plain PyTorch does, with 1 if not, with 2 if it was called wrongly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from hecate.config import FSSDPConfig
from hecate.ranks.agree import on_rank_0
from hecate.ranks.join import join
from hecate.verify.command import random_batch, read_settings, subject
from hecate.verify.report import Report
from hecate.verify.run import verify
from hecate.verify.task import adamw

__all__ = ["main"]

DEFAULTS: Mapping[str, Any] = {
    "steps": 5,
    "accumulate": 2,
    "batch": 2,
    "length": 16,
    "dtype": "float64",
    "policies": None,
    "optimizer": "adamw",
    "seed": 0,
    "folder": None,
}
KEYS = """keys and defaults:
  model=PATH        a folder as transformers' save_pretrained writes it, or a config.json; weights are read if there are
                    any and nothing is overridden
  steps=5           optimizer steps; accumulate=2 micro-batches of batch=2 sequences of length=16 random tokens per rank
  dtype=float64     float32 or bfloat16; own: the model's
  policies=a,b      default: the configured one, balanced, hecate, ep
  optimizer=adamw   or sgd (with momentum)
  seed=0
  folder=PATH       for a checkpoint, which all ranks must see; default: temporary files of the machine
  fssdp.NAME=VALUE  a field of hecate.FSSDPConfig, e.g. fssdp.dense=replicate
  NAME=VALUE        any other: overrides the model's config, e.g. num_hidden_layers=2; the output states it
"""


def main() -> None:
    """Read the command line, join torchrun's processes, verify, print, and exit."""
    parser = argparse.ArgumentParser(
        prog="python -m hecate.verify",
        description="Does Hecate change training? Trains a transformers MoE plainly and under Hecate, and compares.",
        epilog=KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="+", metavar="key=value")
    words = parser.parse_args().settings
    device = join()
    try:
        report = run(words, device)
    except (ValueError, TypeError) as error:
        message = f"error: {error}"
        on_rank_0(lambda: print(message, file=sys.stderr, flush=True))
        sys.exit(2)
    on_rank_0(lambda: print(report, flush=True))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(0 if report.ok else 1)


def run(words: list[str], device: torch.device) -> Report:
    """The report about what `words` ask for; ValueError for a wrong key or value."""
    settings = read_settings(words)
    if "model" not in settings:
        raise ValueError("model=FOLDER is missing")
    source = str(settings.pop("model"))
    config = _fssdp({key: settings.pop(key) for key in list(settings) if key.startswith("fssdp.")})
    ours = {key: settings.pop(key, default) for key, default in DEFAULTS.items()}
    model_fn, vocab, notes = subject(source, settings, device)
    report = verify(
        model_fn,
        random_batch(vocab, ours["batch"], ours["length"]),
        config,
        ours["steps"],
        accumulate=ours["accumulate"],
        optimizer_fn=_one_of("optimizer", ours["optimizer"], {"adamw": adamw, "sgd": _sgd}),
        policies=None if ours["policies"] is None else ours["policies"].split(","),
        dtype=_one_of("dtype", ours["dtype"], _dtypes()),
        seed=ours["seed"],
        folder=ours["folder"],
    )
    return replace(report, notes=(*notes, *report.notes))


def _fssdp(given: Mapping[str, Any]) -> FSSDPConfig:
    values = {key.removeprefix("fssdp."): value for key, value in given.items()}
    valid = [field.name for field in fields(FSSDPConfig) if not field.name.endswith("_dtype")]
    if unknown := sorted(set(values) - set(valid)):
        raise ValueError(f"fssdp.{unknown[0]}: no such field; there are {', '.join(valid)}")
    return FSSDPConfig(**{"reshard_interval": 0} | values)


def _one_of(key: str, value: object, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{key}={value}: must be one of {', '.join(choices)}")
    return choices[str(value)]


def _dtypes() -> dict[str, torch.dtype | None]:
    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "own": None}


def _sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


if __name__ == "__main__":
    main()
