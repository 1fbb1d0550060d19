"""Training steps of the policies side by side, beside those of a router that loads all devices alike (the ceiling).

    python -m benchmarks.steps --json FILE [key=value ...]     # keys of conf/config.yaml: model=..., devices=4

All trainers run in the same processes and take steps in turn, so that other load on the machine slows all of them
alike. Step times are compared within a round; a ratio is the median over all rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.report import Report
from hecate.models import Routing, TopKGate
from hecate.train.distributed import World, launch
from hecate.train.folder import RunFolder
from hecate.train.loop import Trainer
from hecate.train.settings import Settings, conf_dir

CEILING = "ceiling"
WARM_UP = 15  # rounds that are not measured, while caches and the load history fill
EXPONENT = 1.2  # of the Zipf law of the skewed router
METRICS = ("imbalance_before", "imbalance_after", "copies")

Picks = Callable[[TopKGate, int, int], Tensor]
Step = Mapping[str, Any]


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--policies",
        default="ep,hecate,balanced",
        help="with commas between; NAME:KEY=VALUE is a policy with a setting of fssdp, as balanced:reshard_interval=20",
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        config = _config([*arguments.overrides, f"output={folder}"])
        policies = arguments.policies.split(",")
        launch(config, partial(measure, policies=policies, rounds=arguments.rounds, file=arguments.json))


def _config(overrides: Sequence[str]) -> dict[str, Any]:
    with hydra.initialize_config_dir(version_base=None, config_dir=str(conf_dir())):
        config = OmegaConf.to_container(hydra.compose("config", overrides=list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return {str(name): value for name, value in config.items()}


def measure(config: Mapping[str, Any], world: World, policies: Sequence[str], rounds: int, file: Path) -> None:
    """One rank's part; rank 0 reports."""
    routers: dict[str, Picks | None] = {
        "router's own choice": None,
        f"Zipf {EXPONENT} router": zipf,
        "even router": even,  # nothing to balance: no policy may be slower than "ep"
    }
    trainers = {(CEILING, CEILING): _trainer(config, world, "ep", even)}
    for router, picks in routers.items():
        trainers |= {(router, policy): _trainer(config, world, policy, picks) for policy in policies}
    steps: dict[tuple[str, str], list[Step]] = {key: [] for key in trainers}
    for i in range(WARM_UP + rounds):
        for key, trainer in trainers.items():
            found = trainer.step()
            if i >= WARM_UP:
                steps[key].append(found)
    if world.rank == 0:
        report = summarize(Settings.from_config(config), steps, routers, policies)
        print(*(report.table(metric) for metric in ("step time / ceiling", "step time / ep", *METRICS)), sep="\n\n")
        report.write(file)


def _trainer(config: Mapping[str, Any], world: World, policy: str, picks: Picks | None) -> Trainer:
    config = {**config, "fssdp": {**config["fssdp"], **_policy_settings(policy)}}
    settings = Settings.from_config(config)
    trainer = Trainer(settings, world, RunFolder(settings.folder, config, resume=False, launches={}))
    gates = [module for module in trainer.model.modules() if isinstance(module, TopKGate)]
    for layer, gate in enumerate(gates):
        if picks is not None:
            gate.register_forward_hook(partial(_choose, picks, layer))
    return trainer


def _policy_settings(policy: str) -> dict[str, str | int]:
    """Settings of fssdp in `NAME:KEY=VALUE:KEY=VALUE`; values are integers."""
    name, *changes = policy.split(":")
    return {"policy": name} | {key: int(value) for key, value in (change.split("=") for change in changes)}


# Routers.


def _choose(picks: Picks, layer: int, gate: nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> Routing:
    """A forward hook on the gate: replaces its experts by others, with the weights that it computed for its own."""
    assert isinstance(gate, TopKGate)
    index = picks(gate, layer, routing.expert_index.shape[0])
    return routing._replace(expert_index=index.to(routing.expert_index.device))


def zipf(gate: TopKGate, layer: int, tokens: int) -> Tensor:
    """`[T, k]` experts drawn in proportion to `rank ** -EXPONENT`; each layer has different hot experts."""
    ranks = torch.randperm(gate.num_experts, generator=torch.Generator().manual_seed(layer)) + 1
    scores = -EXPONENT * ranks.log().expand(tokens, -1)
    # Drawn from the global generator, so that recomputation draws the same; by Gumbel noise, without replacement.
    return (scores - torch.empty(tokens, gate.num_experts).exponential_().log()).topk(gate.top_k, dim=1).indices


def even(gate: TopKGate, layer: int, tokens: int) -> Tensor:
    """`[T, k]` experts, each used equally often."""
    return torch.arange(tokens * gate.top_k).view(tokens, gate.top_k) % gate.num_experts


# Report.


def summarize(
    settings: Settings,
    steps: Mapping[tuple[str, str], Sequence[Step]],
    routers: Mapping[str, Picks | None],
    policies: Sequence[str],
) -> Report:
    """Report ratios of step times, and the policies' copies and imbalance."""
    report = Report()
    size = f"{settings.devices} processes, {settings.batch_size * settings.sequence_length} tokens each"
    ceiling = steps[CEILING, CEILING]
    report.add(size, CEILING, "seconds", median(step["seconds"] for step in ceiling), "s")
    for router in routers:
        setting = f"{router}, {size}"
        for policy in policies:
            own = steps[router, policy]
            report.add(setting, policy, "seconds", median(step["seconds"] for step in own), "s")
            report.add(setting, policy, "step time / ceiling", _ratio(own, ceiling))
            if "ep" in policies:
                report.add(setting, policy, "step time / ep", _ratio(own, steps[router, "ep"]))
            for metric in METRICS:
                report.add(setting, policy, metric, mean(step[metric] for step in own))
    return report


def _ratio(over: Sequence[Step], under: Sequence[Step]) -> float:
    return median(a["seconds"] / b["seconds"] for a, b in zip(over, under, strict=True))


if __name__ == "__main__":
    main()
