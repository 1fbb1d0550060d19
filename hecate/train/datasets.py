"""Data of the user: two datasets with `__len__` and `__getitem__`, for training and validation."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import default_collate

from hecate.train.target import Target

__all__ = ["Dataset", "UserData"]


@runtime_checkable
class Dataset(Sized, Protocol):
    """Items by number."""

    def __getitem__(self, index: int, /) -> Any: ...


class UserData:
    """Batches of the user's items, as torch's `default_collate` puts them together.

    The training items come in an order that is drawn anew for each epoch, by a counter-based generator keyed by (seed,
    epoch). So a batch depends only on the seed and its position, as with text, and a run resumes with the items it has
    not used.

    Args:
        target: returns the two datasets, training and validation.
    """

    bytes_per_token = None

    def __init__(self, target: Target) -> None:
        made = target.make()
        self._where = f"data._target_={target.path!r}"
        if not isinstance(made, tuple | list) or len(made) != 2 or not all(isinstance(one, Dataset) for one in made):
            raise ValueError(
                f"{self._where}: returned {_kinds(made)}; must be two datasets with __len__ and __getitem__, for "
                "training and validation"
            )
        self._train, self._validation = made
        if not len(self._train) or not len(self._validation):
            raise ValueError(f"{self._where}: a dataset is empty")
        self._order: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    @property
    def source(self) -> str:
        """What the banner says."""
        return f"{self._where}, {len(self._train):,} items to train, {len(self._validation):,} to validate"

    def training_batch(self, seed: int, first: int, size: int, length: int) -> Any:
        """The training items at the positions `first` .. `first + size - 1`."""
        return default_collate([self._train[self._at(seed, position)] for position in range(first, first + size)])

    def validation_count(self, asked: int) -> int:
        """No item twice."""
        return min(asked, len(self._validation))

    def validation_batch(self, indices: range, total: int, length: int) -> Any:
        """The items `indices` of `total` evenly spaced ones."""
        room = len(self._validation) - 1
        return default_collate([self._validation[index * room // max(total - 1, 1)] for index in indices])

    def _at(self, seed: int, position: int) -> int:
        epoch, place = divmod(position, len(self._train))
        if self._order is None or self._order[0] != (seed, epoch):
            generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
            self._order = (seed, epoch), generator.permutation(len(self._train))
        return int(self._order[1][place])


def _kinds(made: Any) -> str:
    if isinstance(made, tuple | list):
        return f"{type(made).__name__} of {', '.join(type(one).__name__ for one in made) or 'nothing'}"
    return type(made).__name__
