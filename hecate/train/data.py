"""Tokens for training and validation: bytes of text files, or a file of token ids.

Sequence i of a run depends only on (seed, i). So the position in the data is one number, and a run resumed on another
number of devices continues with the sequences it has not yet used.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.train.settings import DataSettings

__all__ = ["Corpus", "load_corpus"]

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


@dataclass(frozen=True)
class Corpus:
    """Two token streams.

    Attributes:
        train: token ids for training, one-dimensional.
        validation: token ids for validation, from other files (or the tail, if there is one file).
        token_limit: exclusive upper bound of token ids.
        source: description of where the tokens come from, for error messages.
    """

    train: NDArray[np.integer]
    validation: NDArray[np.integer]
    token_limit: int
    source: str

    def training_batch(self, seed: int, first: int, size: int, length: int) -> Tensor:
        """Training sequences `first` .. `first + size - 1`, int64 `[size, length + 1]`.

        A row holds the input and, shifted by one, the targets. Its start is drawn uniformly over the stream, by a
        counter-based generator keyed by (seed, sequence number).
        """
        starts = [self._start(seed, index, length) for index in range(first, first + size)]
        return self._cut(self.train, starts, length)

    def validation_batch(self, indices: range, total: int, length: int) -> Tensor:
        """The sequences `indices` of `total` evenly spaced ones, int64 `[len(indices), length + 1]`; may be empty."""
        room = self.validation.size - length - 1
        return self._cut(self.validation, [index * room // max(total - 1, 1) for index in indices], length)

    def _start(self, seed: int, index: int, length: int) -> int:
        generator = np.random.Generator(np.random.Philox(key=[seed, index]))
        return int(generator.integers(0, self.train.size - length))

    def _cut(self, stream: NDArray[np.integer], starts: list[int], length: int) -> Tensor:
        rows = [np.asarray(stream[start : start + length + 1], dtype=np.int64) for start in starts]
        batch = np.stack(rows) if rows else np.empty((0, length + 1), dtype=np.int64)
        if batch.size and not 0 <= batch.min() <= batch.max() < self.token_limit:
            raise ValueError(
                f"data {self.source}: token ids reach from {batch.min()} to {batch.max()}, must be in "
                f"[0, {self.token_limit}) for this model.vocab_size"
            )
        return torch.from_numpy(batch)


def load_corpus(settings: DataSettings, length: int, token_limit: int) -> Corpus:
    """Read and split the data that `settings` names; ValueError if it does not exist, has no text or is too short."""
    if settings.path is None:
        path, files = Path(sysconfig.get_path("stdlib")), _standard_library()
    else:
        path = Path(settings.path)
        if path.suffix == ".bin":
            stream = _token_file(path, settings.dtype)
            return _split_tail(stream, settings.validation_share, length, token_limit, str(path))
        files = _text_files(path)
    streams = [np.frombuffer(f.read_bytes(), dtype=np.uint8) for f in files]
    if sum(s.size for s in streams) == 0:
        raise ValueError(f"data.path={str(path)!r}: has no text (searched all files below it without a zero byte)")
    source = f"{path} ({len(files)} files)"
    if len(files) == 1:
        return _split_tail(streams[0], settings.validation_share, length, token_limit, source)
    held_out = _held_out([f.relative_to(path).as_posix() for f in files], settings.validation_share)
    train = np.concatenate([s for s, held in zip(streams, held_out, strict=True) if not held])
    validation = np.concatenate([s for s, held in zip(streams, held_out, strict=True) if held])
    return _long_enough(Corpus(train, validation, token_limit, source), length)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    own = [f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.relative_to(root).parts)]
    return sorted(own)


def _text_files(path: Path) -> list[Path]:
    """Text files at or below `path`, sorted; no hidden files, none with a zero byte in the first 8 KB (git's rule)."""
    if not path.exists():
        raise ValueError(
            f"data.path={str(path)!r}: does not exist; must be a folder of text, a text file or a .bin file"
        )
    candidates = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return [f for f in candidates if not _hidden(f, path) and b"\0" not in _head(f)]


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(8192)


def _held_out(names: list[str], share: float) -> list[bool]:
    """For each file, whether it is for validation: if its hashed name is below `share`; at least one, never all."""
    place = np.array([int.from_bytes(hashlib.sha256(n.encode()).digest()[:6], "big") / 2**48 for n in names])
    held = place < share
    held[place.argmin()] = True
    held[place.argmax()] = False
    return list(held)


def _token_file(path: Path, dtype: str | None) -> NDArray[np.integer]:
    if not path.is_file():
        raise ValueError(f"data.path={str(path)!r}: does not exist")
    if dtype not in TOKEN_DTYPES:
        raise ValueError(f"data.dtype={dtype!r}: a .bin file needs one of {', '.join(TOKEN_DTYPES)}")
    item = np.dtype(dtype).itemsize
    if path.stat().st_size % item or path.stat().st_size == 0:
        raise ValueError(
            f"data.path={str(path)!r}: {path.stat().st_size} bytes, must be a multiple of {item} ({dtype})"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _split_tail(stream: NDArray[np.integer], share: float, length: int, token_limit: int, source: str) -> Corpus:
    """Split a single stream: its tail is for validation."""
    border = int(stream.size * (1 - share))
    return _long_enough(Corpus(stream[:border], stream[border:], token_limit, source), length)


def _long_enough(corpus: Corpus, length: int) -> Corpus:
    for name, stream in (("training", corpus.train), ("validation", corpus.validation)):
        if stream.size < length + 1:
            raise ValueError(
                f"data {corpus.source}: {stream.size} tokens for {name}, must be > sequence_length={length}"
            )
    return corpus
