"""The ways in which `hecate.verify` trains: every policy may be the configured one."""

from __future__ import annotations

from typing import get_args

import pytest

from hecate.config import FSSDPConfig, PolicyName
from hecate.verify.ways import ways


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_every_policy_has_something_to_do(policy: PolicyName) -> None:
    config = FSSDPConfig(policy=policy, reshard_interval=50)
    found = {way.name: way.config for way in ways(config, get_args(PolicyName), recompute=True)}
    assert found["as configured"] == config
    assert {c.policy for name, c in found.items() if name.startswith("policy ")} == set(get_args(PolicyName))
    for name in ("smartmoe", "flexmoe"):  # which do nothing but every `reshard_interval` steps
        assert found[f"policy {name}"].reshard_interval == 1
