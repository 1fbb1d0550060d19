"""Tests the check whether boxes fill a tensor exactly."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from hecate.checkpoint.cover import check_tiles

Box = tuple[tuple[int, ...], tuple[int, ...]]


def check(size: tuple[int, ...], boxes: list[Box]) -> None:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    check_tiles("it", torch.Size(size), chunks)


def split(size: tuple[int, ...], chance: random.Random) -> list[Box]:
    """A random tiling, made by repeatedly cutting boxes."""
    boxes: list[Box] = [((0,) * len(size), size)]
    for _ in range(chance.randrange(6)):
        offsets, sizes = boxes.pop(chance.randrange(len(boxes)))
        dim = chance.randrange(len(size))
        at = chance.randint(0, sizes[dim])
        moved = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
        boxes.append((offsets, (*sizes[:dim], at, *sizes[dim + 1 :])))
        boxes.append((moved, (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :])))
    chance.shuffle(boxes)
    return boxes


def right(size: tuple[int, ...], boxes: list[Box]) -> bool:
    """The reference: counts how often each element is in a box."""
    count: dict[tuple[int, ...], int] = dict.fromkeys(itertools.product(*map(range, size)), 0)
    for offsets, sizes in boxes:
        if any(o + s > n for o, s, n in zip(offsets, sizes, size, strict=True)):
            return False
        for element in itertools.product(*(range(o, o + s) for o, s in zip(offsets, sizes, strict=True))):
            count[element] += 1
    return all(number == 1 for number in count.values())


@pytest.mark.parametrize("seed", range(300))
def test_like_counting(seed: int) -> None:
    chance = random.Random(seed)
    size = tuple(chance.randint(1, 5) for _ in range(chance.randint(1, 3)))
    boxes = split(size, chance)
    check(size, boxes)
    offsets, sizes = boxes[chance.randrange(len(boxes))]
    change = chance.choice(["drop", "repeat", "move", "grow"])
    if change == "drop":
        boxes.remove((offsets, sizes))
    elif change == "repeat":
        boxes.append((offsets, sizes))
    else:
        dim = chance.randrange(len(size))
        boxes.remove((offsets, sizes))
        one_more = tuple(value + (i == dim) for i, value in enumerate(offsets if change == "move" else sizes))
        boxes.append((one_more, sizes) if change == "move" else (offsets, one_more))
    if right(size, boxes):
        check(size, boxes)
    else:
        with pytest.raises(ValueError, match=r"^it"):
            check(size, boxes)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"it: 4 of 6 elements are in no chunk, the checkpoint is incomplete"):
        check((3, 2), [((1, 0), (1, 2))])
    with pytest.raises(ValueError, match=r"a chunk of shape \(2, 2\) at \(0, 0\) and a chunk .* at \(1, 0\) overlap"):
        check((3, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))])
    with pytest.raises(ValueError, match=r"it has shape \(3,\), but a chunk of shape \(2,\) at \(2,\), which is out"):
        check((3,), [((0,), (1,)), ((2,), (2,))])
    with pytest.raises(ValueError, match="outside"):
        check((3, 1), [((0,), (3,))])
    with pytest.raises(ValueError, match="1 of 1 elements"):
        check((), [])
    with pytest.raises(ValueError, match="2 chunks overlap"):
        check((), [((), ()), ((), ())])


def test_empty_chunks_count_for_nothing() -> None:
    check((), [((), ())])
    check((0, 3), [])
    check((2, 3), [((0, 0), (2, 3)), ((2, 0), (0, 3)), ((0, 0), (0, 3))])


def test_sizes_beyond_any_memory() -> None:
    with pytest.raises(ValueError, match=f"{math.prod([2**62, 2**62])} of"):
        check((2**62, 2**62), [])
