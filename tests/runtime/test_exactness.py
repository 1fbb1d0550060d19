"""FSSDP computes what the dense model computes in one process, for a set of cases that covers interacting settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.runtime.helpers import config
from tests.runtime.reference import TINY, Case, compare, run_twice
from tests.workers import Groups

NON_REENTRANT = replace(TINY, checkpoint=True)
REENTRANT = replace(TINY, checkpoint=True, use_reentrant=True)
FLOAT32 = {"dtype": torch.float32}

CASES = {
    "1-ep": (1, Case(config("ep"))),
    "1-balanced-checkpoint": (1, Case(config("balanced", rematerialize=True), model=NON_REENTRANT, accumulate=2)),
    "2-ep-reshard": (2, Case(config("ep", reshard_interval=1), accumulate=2)),
    "2-balanced": (2, Case(config("balanced"))),
    "2-balanced-float32": (2, Case(config("balanced"), **FLOAT32)),
    "2-balanced-remat-checkpoint-accumulate": (
        2,
        Case(config("balanced", rematerialize=True, reshard_interval=1), model=NON_REENTRANT, accumulate=2),
    ),
    "2-hecate-no-sync": (2, Case(config("hecate", reshard_interval=1), accumulate=2, use_no_sync=True)),
    "2-replicate-no-sync": (
        2,
        Case(config("balanced", dense="replicate", reshard_interval=1), accumulate=2, use_no_sync=True),
    ),
    "2-replicate-float32": (2, Case(config("hecate", dense="replicate", rematerialize=True), **FLOAT32)),
    "2-reentrant": (2, Case(config("balanced", reshard_interval=1), model=REENTRANT, accumulate=2)),
    "2-reentrant-remat": (2, Case(config("hecate", rematerialize=True), model=REENTRANT)),
    "2-joint-backward": (
        2,
        Case(config("balanced", rematerialize=True), model=NON_REENTRANT, accumulate=2, joint_backward=True),
    ),
    "2-one-expert": (2, Case(config("balanced"), model=replace(TINY, top_k=1), router="one")),
    "2-unpicked": (2, Case(config("hecate", reshard_interval=1), router="unpicked")),
    "2-kernels-float32": (
        2,
        Case(
            config("balanced", kernels="hecate", rematerialize=True, reshard_interval=1),
            model=NON_REENTRANT,
            accumulate=2,
            batch=(2, 1),
            **FLOAT32,
        ),
    ),
    "2-kernels-bfloat16": (2, Case(config("balanced", kernels="hecate"), dtype=torch.bfloat16)),
    "3-balanced-reshard": (3, Case(config("balanced", reshard_interval=1))),
    "3-pool-a-layer": (
        3,
        Case(config("balanced", reshard_interval=1, pools="layer"), model=replace(TINY, num_experts=7)),
    ),
    "1-pool-a-layer": (1, Case(config("ep", pools="layer"), accumulate=2)),
    "2-pool-a-layer": (2, Case(config("ep", pools="layer"), accumulate=2)),
    "3-uneven-experts": (3, Case(config("balanced", reshard_interval=1), model=replace(TINY, num_experts=7))),
    "3-few-tokens": (3, Case(config("balanced", rematerialize=True), model=NON_REENTRANT, batch=(2, 1, 0))),
    "3-hecate-few-tokens": (3, Case(config("hecate", calibrate=False), batch=(0, 3, 1), accumulate=2)),
    "3-paper-one-expert-remat": (
        3,
        Case(config("hecate", rematerialize=True), model=replace(TINY, top_k=1), router="one"),
    ),
    "4-more-devices-than-experts": (
        4,
        Case(config("balanced", reshard_interval=1), model=replace(TINY, num_experts=3), accumulate=2),
    ),
    "4-fewer-rows-than-devices": (4, Case(config("hecate"), model=replace(TINY, num_experts=2, num_layers=1))),
    "4-mesh-2x2": (4, Case(config("balanced", reshard_interval=1), mesh=(2, 2), accumulate=2)),
    "4-mesh-2x2-remat-no-sync": (
        4,
        Case(
            config("hecate", rematerialize=True),
            model=NON_REENTRANT,
            mesh=(2, 2),
            accumulate=2,
            use_no_sync=True,
        ),
    ),
    "4-mesh-2x2-uneven": (
        4,
        Case(config("balanced", reshard_interval=1, overlap_degree="auto"), mesh=(2, 2), batch=(4, 4, 1, 1)),
    ),
    "4-mesh-2x2-bfloat16-gradients": (
        4,
        # One step: what bfloat16 rounds would grow in the next ones.
        Case(config("balanced", reduce_dtype=torch.bfloat16), mesh=(2, 2), accumulate=2, steps=1, **FLOAT32),
    ),
    "4-mesh-2x2-replicate": (4, Case(config("balanced", dense="replicate"), mesh=(2, 2), accumulate=2)),
    "4-balanced-remat": (
        4,
        Case(config("balanced", rematerialize=True, reshard_interval=1), model=NON_REENTRANT, **FLOAT32),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_model(groups: Groups, name: str) -> None:
    world_size, case = CASES[name]
    groups(world_size).run(compare, case)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_same_seed_same_bits(groups: Groups, rematerialize: bool) -> None:
    case = Case(config("balanced", rematerialize=rematerialize, reshard_interval=2), dtype=torch.float32, steps=4)
    groups(3).run(run_twice, case)
