"""Honest skew: loads of real routers on real text, with and without auxiliary loss, next to Zipf's.

    python -m benchmarks.routing --json FILE --traces FOLDER

For each kind of router a tiny model of transformers is trained on Python's standard library, byte by byte, in one
process whose batch stands for 8 devices in 2 nodes. Its loads are recorded with `hecate.loads.trace`, so that
`benchmarks.end_to_end --skew trace:FILE` can use them. Then every policy plans every step from the steps before it, as
the runtime does, and the mean over steps and layers of max/mean device load is reported. Nothing is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.report import Report
from hecate.adapters.base import find_experts
from hecate.cost import CostModel, LayerCost
from hecate.loads.synthetic import synthetic_loads
from hecate.loads.trace import TraceWriter, read_trace
from hecate.placement import Placement, Topology, initial_owners
from hecate.policies import LayerSetting, get_policy
from hecate.train.data import load_corpus
from hecate.train.settings import DataSettings

Int64 = NDArray[np.int64]

TOPOLOGY = Topology(8, 4)
EXPERTS, TOP_K, WIDTH, LENGTH = 32, 2, 64, 128
WINDOW = 5
ROUTERS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "mixtral": ({}, True),
    "qwen3_moe": ({"norm_topk_prob": True}, True),
    "gpt_oss": ({}, True),
    "deepseek_v3": ({"kv_lora_rank": 16, "q_lora_rank": 16, "first_k_dense_replace": 0, "head_dim": 8}, False),
}
"""Architecture -> settings, and whether transformers can add an auxiliary loss to its loss.

Softmax then top-k, renormalized (mixtral, qwen3_moe); top-k then softmax, with a bias (gpt_oss); sigmoid (deepseek_v3).
"""

SIZES: Mapping[str, Any] = {
    "vocab_size": 256,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "moe_intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Set if the architecture's config has the attribute."""

COST = LayerCost(CostModel(), 2**21, 2**21, 6 * 2**20, 2048, 2**24)
SETTING = LayerSetting(TOPOLOGY, COST, 2, 1.02, "auto", "always", LENGTH)
POLICIES = {
    "ep": SETTING,
    "smartmoe": SETTING,
    "fastermoe": SETTING,
    "hecate": replace(SETTING, overlap_degree=4),
    "balanced": SETTING,
    "exact": SETTING,
}
"""2 memory slots and a dial of 1.02 for all; the paper's t is 4."""


def make_model(router: str, aux: bool) -> nn.Module:
    """A tiny model with random weights; nothing is downloaded."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[router]
    own, _ = ROUTERS[router]
    plain = kind()
    given = {key: value for key, value in SIZES.items() if hasattr(plain, key)}
    config = kind(**{**given, **own}, use_cache=False)
    if aux:
        config.output_router_logits, config.router_aux_loss_coef = True, 0.01
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.train()


def record(router: str, aux: bool, steps: int, path: Path) -> None:
    """Train for `steps` steps and write the counts of each."""
    torch.manual_seed(0)
    model = make_model(router, aux)
    corpus = load_corpus(DataSettings("text", None, None, 0.05, 1.0), LENGTH, 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    devices = TOPOLOGY.num_devices
    experts = [found.spec.num_experts for found in find_experts(model)]
    with TraceWriter(path, TOPOLOGY, experts) as trace, _choices(model) as chosen:
        for step in range(steps):
            batch = corpus.training_batch(0, step * devices, devices, LENGTH)[:, :-1]
            chosen.clear()
            model(input_ids=batch, labels=batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            trace.append(step, [_counts(chosen[layer], n) for layer, n in enumerate(experts)])


@contextmanager
def _choices(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Layer -> int64 `[T, k]`, what the routers chose in the last forward pass."""
    chosen: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        return lambda module, args: chosen.__setitem__(layer, args[1].detach())

    handles = [f.module.register_forward_pre_hook(hook(i)) for i, f in enumerate(find_experts(model))]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def _counts(index: Tensor, experts: int) -> Int64:
    """Int64 `[devices, experts]`: each device has one sequence of the batch."""
    of_device = index.view(TOPOLOGY.num_devices, -1)
    return np.stack([row.bincount(minlength=experts).numpy() for row in of_device]).astype(np.int64)


def imbalance(policy_name: str, loads: Int64, interval: int = 100) -> float:
    """Mean over steps of max/mean device load that the policy leaves; loads are int64 `[steps, devices, experts]`."""
    policy, layer = get_policy(policy_name), POLICIES[policy_name]
    owners, left, summed = initial_owners(loads.shape[2], TOPOLOGY.num_devices), [], np.zeros(loads.shape[2], np.int64)
    for step, counts in enumerate(loads):
        if step and step % interval == 0:
            (owners,), summed = policy.reshard([layer], [summed], [owners]), np.zeros_like(summed)
        placement = Placement.from_owners(owners, TOPOLOGY.num_devices)
        if step:
            placement = policy.materialize(layer, loads[max(0, step - WINDOW) : step], owners)
        placement = policy.calibrate(layer, counts, owners, placement)
        left.append(policy.assign(layer, counts, owners, placement).imbalance)
        summed = summed + counts.sum(axis=0)
    return float(np.mean(left))


def add_rows(report: Report, name: str, layers: Sequence[Int64]) -> None:
    """The imbalance of every policy, mean over layers."""
    for policy in POLICIES:
        report.add(name, policy, "imbalance", float(np.mean([imbalance(policy, loads) for loads in layers])))


def main() -> None:
    """Parse, record, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--traces", type=Path, help="folder to keep the traces in")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--routers", nargs="+", choices=tuple(ROUTERS), default=tuple(ROUTERS), metavar="NAME")
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        traces = given.traces or Path(folder)
        traces.mkdir(parents=True, exist_ok=True)
        for router in given.routers:
            for aux in (False, True) if ROUTERS[router][1] else (False,):
                words = "with" if aux else "without"
                path = traces / f"{router}-{words}-aux.npz"
                path.unlink(missing_ok=True)
                record(router, aux, given.steps, path)
                add_rows(report, f"{router} {words} auxiliary loss, {given.steps} steps", read_trace(path).layers)
    for kind in ("zipf", "drift"):
        size = (TOPOLOGY.num_devices, EXPERTS, LENGTH, TOP_K)
        loads = synthetic_loads(kind, *size, seed=0, steps=given.steps, exponent=1.2)
        add_rows(report, f"synthetic {kind} 1.2", [loads])
    print(report.table("imbalance"))
    if given.json:
        report.write(given.json)


if __name__ == "__main__":
    main()
