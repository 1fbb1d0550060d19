"""What of the dry run can be tried without a CUDA build of torch: its parts import, and the cases name models."""

from __future__ import annotations

from tests.dry_run.cases import CASES, ranks_of
from tests.dry_run.run import MODELS


def test_every_case_has_a_model_and_ranks_within_its_job() -> None:
    for case in CASES:
        assert case.model in MODELS
        assert set(ranks_of(case)) <= set(range(case.world))
        assert case.world % (case.replicas * case.per_node) == 0 or case.per_node > case.world // case.replicas
