"""Checks that a checkpoint's chunks cover every tensor exactly once and that its files are long enough for them."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence

from torch import Size
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

__all__ = ["check_stored", "check_tiles"]

Chunks = Sequence[ChunkStorageMetadata]


def check_stored(where: str, metadata: Metadata, names: Iterable[str], sizes: Mapping[str, int]) -> None:
    """Check that tensors are complete, before anything is read or allocated.

    Args:
        where: prefix of error messages.
        metadata: the checkpoint's DCP metadata.
        names: tensors to check.
        sizes: size of each file in bytes.

    Raises:
        ValueError: a tensor is stored as bytes, its chunks have a gap or overlap, or a chunk lies outside its file;
            the message names the tensor.
    """
    used = dict.fromkeys(sizes, 0)
    for name in names:
        tensor = metadata.state_dict_metadata[name]
        if not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{where}: {name} is stored as pickled bytes, which are not read; it must be a tensor")
        check_tiles(f"{where}: {name}", tensor.size, tensor.chunks)
        for chunk in tensor.chunks:
            if num_bytes := math.prod(chunk.sizes) * tensor.properties.dtype.itemsize:
                _check_bytes(where, metadata, MetadataIndex(name, chunk.offsets), num_bytes, sizes, used)


def _check_bytes(
    where: str,
    metadata: Metadata,
    chunk: MetadataIndex,
    num_bytes: int,
    sizes: Mapping[str, int],
    used: dict[str, int],
) -> None:
    """Check that one chunk lies inside its file.

    `used` sums the chunk bytes per file; a sum above the file's size means that chunks share bytes.
    """
    what = f"{where}: the chunk of {chunk.fqn} at {tuple(chunk.offset or ())}"
    if chunk not in metadata.storage_data:
        raise ValueError(f"{what} is in no file")
    info = metadata.storage_data[chunk]
    if info.transform_descriptors:
        raise ValueError(f"{what} is stored by {', '.join(info.transform_descriptors)}, which is not supported")
    if info.relative_path not in sizes:
        raise ValueError(f"{what} is in file {info.relative_path}, which is none of the checkpoint")
    used[info.relative_path] += info.length
    size = sizes[info.relative_path]
    if info.length < num_bytes or info.offset + info.length > size or used[info.relative_path] > size:
        raise ValueError(
            f"{what}, {num_bytes} bytes, is said to be bytes {info.offset} to {info.offset + info.length} of "
            f"{info.relative_path}, which has {size}"
        )


def check_tiles(what: str, size: Size, chunks: Chunks) -> None:
    """ValueError unless the boxes `chunks` fill a tensor of shape `size` with no gap, no overlap and none outside."""
    for chunk in chunks:
        same = len(chunk.offsets) == len(chunk.sizes) == len(size)
        if not same or any(o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, size, strict=True)):
            raise ValueError(f"{what} has shape {tuple(size)}, but {_text(chunk)}, which is outside")
    volume, needed = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(size)
    _check_apart(what, [chunk for chunk in chunks if math.prod(chunk.sizes)])
    if volume != needed:  # always less: overlaps were refused above
        raise ValueError(
            f"{what}: {needed - volume} of {needed} elements are in no chunk, the checkpoint is incomplete"
        )


def _check_apart(what: str, chunks: Chunks) -> None:
    """ValueError if two chunks overlap. Sweeps along the dimension with the most distinct offsets."""
    dims = range(len(chunks[0].offsets)) if chunks else ()
    along = max(dims, key=lambda dim: len({chunk.offsets[dim] for chunk in chunks}), default=None)
    if along is None:  # scalars
        if len(chunks) > 1:
            raise ValueError(f"{what}: {len(chunks)} chunks overlap")
        return
    active: list[tuple[int, int]] = []  # (end, number) of the chunks at the sweep position
    for number in sorted(range(len(chunks)), key=lambda n: chunks[n].offsets[along]):
        chunk = chunks[number]
        del active[: bisect_right(active, (chunk.offsets[along], len(chunks)))]
        for _, other in active:
            if _overlap(chunk, chunks[other]):
                raise ValueError(f"{what}: {_text(chunks[other])} and {_text(chunk)} overlap")
        insort(active, (chunk.offsets[along] + chunk.sizes[along], number))


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    both = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in both)


def _text(chunk: ChunkStorageMetadata) -> str:
    return f"a chunk of shape {tuple(chunk.sizes)} at {tuple(chunk.offsets)}"
