"""One MoE block in one process: Hecate's experts beside transformers' grouped ones, forward and backward.

    python -m benchmarks.one_process --json FILE

Both run the same Mixtral block with the same weights on the same tokens in turn; ratios are taken within a round. There
is nothing to communicate, so this is the host's and the kernels' time alone.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import hecate
from benchmarks.report import Report
from benchmarks.steady import steady

SHAPES = ((512, 1024, 16, 2048), (256, 512, 64, 2048), (512, 1024, 16, 128))
"""Width, expert width, experts, tokens."""

TOP_K = 2
OURS, THEIRS = "hecate", "transformers grouped_mm"


class Block(nn.Module):
    """A Mixtral block; transformers adapts experts by their class, wherever they are in a model."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = "grouped_mm"
        self.mlp = MixtralSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[1, tokens, width]` to the same."""
        output: Tensor = self.mlp(hidden)
        return output


def seconds(model: nn.Module, hidden: Tensor) -> float:
    """Forward and backward pass."""
    model.zero_grad()
    begin = time.perf_counter()
    model(hidden).square().mean().backward()
    return time.perf_counter() - begin


def measure(shape: tuple[int, int, int, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; ValueError if the two outputs differ."""
    width, hidden, experts, tokens = shape
    torch.manual_seed(0)
    plain = Block(width, hidden, experts)
    ours = copy.deepcopy(plain)
    hecate.fully_shard(ours)
    x = torch.randn(1, tokens, width, requires_grad=True)
    if not torch.allclose(ours(x), plain(x), rtol=1e-4, atol=1e-6):
        raise ValueError(f"outputs differ at {shape}")
    models: dict[str, nn.Module] = {OURS: ours, THEIRS: plain}
    found: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 2):
        for name, model in list(models.items())[:: 1 if i % 2 else -1]:
            taken = seconds(model, x)
            if i >= 2:
                found[name].append(taken)
    return found


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    steady()
    report = Report()
    for shape in SHAPES:
        found = measure(shape, given.rounds)
        setting = "d={}, f={}, {} experts, top-2, {} tokens".format(*shape)
        for name, own in found.items():
            report.add(setting, name, "seconds", median(own), "s")
        pairs = zip(found[THEIRS], found[OURS], strict=True)
        report.add(setting, OURS, "speed over transformers", median(a / b for a, b in pairs))
    print(report.table("seconds"), report.table("speed over transformers"), sep="\n\n")
    if given.json:
        report.write(given.json)


if __name__ == "__main__":
    main()
