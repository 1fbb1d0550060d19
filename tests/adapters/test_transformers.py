"""Every transformers architecture with the experts interface trains as it does in one process."""

from __future__ import annotations

import pytest

from tests.adapters.parity import CONFIG, compare_with_plain
from tests.adapters.tiny import ARCHITECTURES, known
from tests.workers import Groups

OFTEN = (
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "jamba",
    "lfm2_moe",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)
"""What `make test` runs; `make test-all` runs all."""


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("model_type", known(ARCHITECTURES, OFTEN))
def test_parity(groups: Groups, model_type: str, world_size: int) -> None:
    groups(world_size).run(compare_with_plain, model_type, CONFIG)
