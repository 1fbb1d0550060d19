"""Every transformers architecture trains in bfloat16 as it does in one process: weights, or computation alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.adapters.parity import BF16_COMPUTE, BF16_MODEL, CONFIG, compare_with_plain
from tests.adapters.tiny import ARCHITECTURES, known
from tests.workers import Groups

OFTEN = (
    "deepseek_v4",  # float32 in attention modules beside bfloat16, and in a module that is not called
    "ernie4_5_moe",  # a float32 router, and a frozen float32 parameter
    "glm4_moe",
    "inkling2_text",  # the forward pass needs the router's weight in float32
    "minimax",  # buffers that must have the dtype of hidden states
    "mixtral",  # one dtype
    "nemotron_h",
)
"""What `make test` runs under FSDP2; `make test-all` runs all, replicated ones too."""
PRECISIONS = {"model": BF16_MODEL, "compute": BF16_COMPUTE}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_type", known(ARCHITECTURES, OFTEN))
def test_parity(groups: Groups, model_type: str, precision: str) -> None:
    groups(2).run(compare_with_plain, model_type, CONFIG, PRECISIONS[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_type", known(ARCHITECTURES, ["deepseek_v3"]))
def test_parity_replicated(groups: Groups, model_type: str, precision: str) -> None:
    groups(2).run(compare_with_plain, model_type, replace(CONFIG, dense="replicate"), PRECISIONS[precision])
