"""Data of the user: the order of items, batches, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hecate.train.data import load_data
from hecate.train.datasets import UserData
from hecate.train.settings import Settings
from hecate.train.target import Target
from tests.train.configs import config

HERE = "tests.train.test_datasets"


class Numbers:
    """Item i is i, and its square."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        assert 0 <= index < self.size
        return {"x": torch.tensor(index), "y": torch.tensor(float(index**2))}


def two(train: int, validation: int) -> tuple[Numbers, Numbers]:
    return Numbers(train), Numbers(validation)


def stream() -> Any:
    return iter([1]), iter([2])


def one() -> Any:
    return Numbers(3)


def data(train: int = 10, validation: int = 5) -> UserData:
    return UserData(Target("data", f"{HERE}.two", {"train": train, "validation": validation}))


def test_every_epoch_has_every_item_in_an_order_of_its_own() -> None:
    items = data().training_batch(3, 0, 30, 8)
    assert items["y"].tolist() == [float(x**2) for x in items["x"]]
    epochs = items["x"].view(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_an_item_is_a_function_of_seed_and_position() -> None:
    whole = data().training_batch(3, 5, 12, 8)["x"].tolist()
    assert data().training_batch(3, 5, 4, 8)["x"].tolist() + data().training_batch(3, 9, 8, 8)["x"].tolist() == whole
    assert data().training_batch(4, 5, 12, 8)["x"].tolist() != whole


def test_validation_items_are_spread() -> None:
    assert [data(validation=9).validation_count(asked) for asked in (5, 256)] == [5, 9]
    assert data(validation=9).validation_batch(range(5), 5, 8)["x"].tolist() == [0, 2, 4, 6, 8]


def test_a_configuration_names_it() -> None:
    settings = Settings.from_config(
        config("~data", f"+data._target_={HERE}.two", "+data.train=4", "+data.validation=2")
    )
    loaded = load_data(settings.data, 8, 256)
    assert loaded.source == f"data._target_='{HERE}.two', 4 items to train, 2 to validate"
    assert loaded.bytes_per_token is None


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("stream", {}, "returned tuple of list_iterator, list_iterator; must be two datasets with __len__"),
        ("one", {}, "returned Numbers; must be two datasets"),
        ("two", {"train": 0, "validation": 3}, "a dataset is empty"),
        ("two", {"train": 1}, r"TypeError: two\(\) missing 1 required"),
    ],
)
def test_what_is_no_data_is_refused(path: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"data._target_='{HERE}.{path}': {message}"):
        UserData(Target("data", f"{HERE}.{path}", arguments))
