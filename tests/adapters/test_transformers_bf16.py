"""Every transformers architecture trains in bfloat16 as it does in one process: weights, or computation alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.adapters.parity import BF16_COMPUTE, BF16_MODEL, compare_with_plain
from tests.adapters.test_transformers import CONFIG
from tests.adapters.tiny import ARCHITECTURES
from tests.workers import Groups

OFTEN = (
    "deepseek_v3",  # a router in float32, which is a module of its own
    "deepseek_v4",  # float32 in attention modules beside bfloat16, and in a module that is not called
    "ernie4_5_moe",  # a frozen float32 parameter, too
    "glm4_moe",
    "inkling2_text",  # the forward pass needs the router's weight in float32
    "minimax",  # buffers that must have the dtype of hidden states
    "mixtral",  # one dtype
    "nemotron_h",
)
"""What `make test` runs; `make test-all` runs all."""
PRECISIONS = {"model": BF16_MODEL, "compute": BF16_COMPUTE}


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "model_type", [a if a in OFTEN else pytest.param(a, marks=pytest.mark.long) for a in ARCHITECTURES]
)
def test_parity(groups: Groups, model_type: str, precision: str, dense: str) -> None:
    groups(2).run(compare_with_plain, model_type, replace(CONFIG, dense=dense), PRECISIONS[precision])
