"""Relative errors: none is overlooked, and none is made of rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hecate.verify.compare import Comparison, Step, parts, relative_error
from tests.adapters.tiny import tiny_model
from tests.verify.models import gpt

EXPECTED = {"a": torch.ones(4), "b": torch.full((3, 2), 2.0)}


def errors(actual: dict[str, Tensor]) -> dict[str, tuple[float, str]]:
    comparison = Comparison("way", {"a": "dense", "b": "experts up"}, 1e-9)
    comparison.tensors("gradient", "step 0", actual, EXPECTED, by_part=True)
    return {row.quantity: (row.error, row.where) for row in comparison.rows}


def test_equal_tensors() -> None:
    assert [error for error, _ in errors(dict(EXPECTED)).values()] == [0.0, 0.0]


def test_the_largest_error_of_each_part_and_its_expert() -> None:
    wrong = EXPECTED["b"].clone()
    wrong[2, 1] += 1
    assert errors({**EXPECTED, "b": wrong}) == {
        "gradient dense": (0.0, "step 0, a"),
        "gradient experts up": (pytest.approx(1 / 24**0.5), "step 0, b, expert 2"),
    }


def test_a_name_that_one_side_lacks() -> None:
    assert errors({"a": EXPECTED["a"]})["gradient experts up"][0] == math.inf
    error, where = errors({**EXPECTED, "c": torch.ones(1)})["gradient dense"]
    assert error == math.inf
    assert "c, which only Hecate has" in where


def test_another_shape_and_nan() -> None:
    assert errors({**EXPECTED, "a": torch.ones(5)})["gradient dense"][0] == math.inf
    assert math.isnan(errors({**EXPECTED, "a": torch.full((4,), math.nan)})["gradient dense"][0])


def test_nan_stays_the_largest() -> None:
    comparison = Comparison("way", {}, 1e-9)
    for number, value in enumerate((1.0, math.nan, 2.0)):
        comparison.tensors("weights", f"step {number}", {"a": torch.tensor([value])}, {"a": torch.ones(1)})
    (row,) = comparison.rows
    assert math.isnan(row.error)
    assert row.where == "step 1, a"
    assert not row.ok


def test_rounding_around_zero_is_measured_by_the_other_tensors() -> None:
    expected = {"zero": torch.zeros(4, dtype=torch.float64), "large": torch.ones(10_000, dtype=torch.float64)}
    noisy = {**expected, "zero": torch.full((4,), 1e-15, dtype=torch.float64)}
    comparison = Comparison("way", {}, 1e-9)
    comparison.tensors("gradient", "step 0", noisy, expected)
    assert comparison.rows[0].ok
    comparison.tensors("gradient", "step 1", {**expected, "zero": noisy["zero"] * 1e6}, expected)
    assert not comparison.rows[0].ok


def test_what_must_be_the_same_bits() -> None:
    comparison = Comparison("way", {}, 1e-9)
    comparison.bits("reloaded weights", "step 0", {"a": torch.ones(2) + 1e-7}, {"a": torch.ones(2)})
    assert not comparison.rows[0].ok
    infinite = torch.tensor([-math.inf, 0.0])
    assert relative_error(infinite, infinite.clone(), 0.0) == (0.0, 0)


def test_one_token_at_the_wrong_expert() -> None:
    comparison = Comparison("way", {}, 1e-9)
    plain = Step(1.0, 1.0, {}, [np.array([2, 2]), np.array([4, 0])], None)
    comparison.step(3, Step(1.0, 1.0, {}, [np.array([2, 2]), np.array([3, 1])], None), plain)
    (row,) = (row for row in comparison.rows if not row.ok)
    assert (row.quantity, row.where) == ("loads", "step 3, MoE layer 1")


@pytest.mark.parametrize(
    ("model", "router", "expert"),
    [
        (gpt, "blocks.1.moe.gate.weight", "blocks.1.moe.experts.down"),
        (lambda: tiny_model("qwen3_moe"), "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_parts(model: type[nn.Module], router: str, expert: str) -> None:
    made = model()
    found = parts(made)
    assert list(found) == [name for name, _ in made.named_parameters()]
    assert found[router] == "router"
    assert found[expert] == f"experts {expert.rpartition('.')[2]}"
    assert sum(part == "router" for part in found.values()) == 2
    assert set(found.values()) - {"router", "dense"} == {part for part in found.values() if part.startswith("experts ")}
