"""Tokens for training and validation: those of text files (bytes, or by a tokenizer), or a file of token ids
(`.npy`, or without a header).

Sequence i of a run depends only on (seed, i). So the position in the data is one number, and a run resumed on another
number of devices continues with the sequences it has not yet used.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.train.datasets import UserData
from hecate.train.settings import BYTES, DataSettings
from hecate.train.target import Target

__all__ = ["Corpus", "Data", "load_corpus", "load_data"]

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
TOKEN_FILES = (".bin", ".npy")


class Data(Protocol):
    """Where batches come from: `Corpus`, or `UserData`.

    Attributes:
        source: description for the log.
        bytes_per_token: mean bytes of text per token; None if unknown.
    """

    @property
    def source(self) -> str: ...

    @property
    def bytes_per_token(self) -> float | None: ...

    def training_batch(self, seed: int, first: int, size: int, length: int) -> Any:
        """The batch of the training sequences `first` .. `first + size - 1`."""

    def validation_count(self, asked: int) -> int:
        """How many sequences to validate on, at most `asked`."""

    def validation_batch(self, indices: range, total: int, length: int) -> Any:
        """The batch of the sequences `indices` of `total` evenly spaced ones."""


@dataclass(frozen=True)
class Corpus:
    """Two token streams.

    Attributes:
        train: token ids for training, one-dimensional.
        validation: token ids for validation, from other files (or the tail, if there is one file).
        token_limit: exclusive upper bound of token ids; None if unknown.
        source: description of where the tokens come from, for messages.
        bytes_per_token: see `Data`.
    """

    train: NDArray[np.integer]
    validation: NDArray[np.integer]
    token_limit: int | None
    source: str
    bytes_per_token: float | None = None

    def training_batch(self, seed: int, first: int, size: int, length: int) -> Tensor:
        """Training sequences `first` .. `first + size - 1`, int64 `[size, length + 1]`.

        A row holds the input and, shifted by one, the targets. Its start is drawn uniformly over the stream, by a
        counter-based generator keyed by (seed, sequence number).
        """
        starts = [self._start(seed, index, length) for index in range(first, first + size)]
        return self._cut(self.train, starts, length)

    def validation_count(self, asked: int) -> int:
        """All that is asked for: sequences may overlap."""
        return asked

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
        limit = np.inf if self.token_limit is None else self.token_limit
        if batch.size and not 0 <= batch.min() <= batch.max() < limit:
            raise ValueError(
                f"data {self.source}: token ids reach from {batch.min()} to {batch.max()}, must be in "
                f"[0, {limit}) for this model.vocab_size"
            )
        return torch.from_numpy(batch)


def load_data(settings: DataSettings | Target, length: int, token_limit: int | None) -> Data:
    """The user's datasets, or `load_corpus`."""
    return UserData(settings) if isinstance(settings, Target) else load_corpus(settings, length, token_limit)


def load_corpus(settings: DataSettings, length: int, token_limit: int | None) -> Corpus:
    """Read and split the data that `settings` names; ValueError if it does not exist, has no text or is too short."""
    if settings.kind not in ("text", "tokens"):
        raise ValueError(f"data.kind={settings.kind!r}: must be one of text, tokens")
    if settings.kind == "text":
        return _text(settings, length, token_limit)
    corpus = Corpus(*_tail(_token_file(settings), settings.validation_share), token_limit, str(settings.path))
    return _long_enough(replace(corpus, bytes_per_token=settings.bytes_per_token), length)


def _text(settings: DataSettings, length: int, token_limit: int | None) -> Corpus:
    if settings.path is None:
        path, files = Path(sysconfig.get_path("stdlib")), _standard_library()
    else:
        path = Path(settings.path)
        if path.suffix in TOKEN_FILES:
            raise ValueError(f"data.path={str(path)!r}: a {path.suffix} file holds tokens; set data=tokens")
        files = _text_files(path)
    texts = [file.read_bytes() for file in files]
    if not any(texts):
        raise ValueError(f"data.path={str(path)!r}: has no text (searched all files below it without a zero byte)")
    streams = _tokens(texts, settings.tokenizer)
    if len(files) == 1:
        train, validation = _tail(streams[0], settings.validation_share)
    else:
        held_out = _held_out([f.relative_to(path).as_posix() for f in files], settings.validation_share)
        train = np.concatenate([s for s, held in zip(streams, held_out, strict=True) if not held])
        validation = np.concatenate([s for s, held in zip(streams, held_out, strict=True) if held])
    size, count = sum(map(len, texts)), sum(s.size for s in streams)
    by = "bytes" if settings.tokenizer in (None, BYTES) else f"tokens by {settings.tokenizer}"
    source = f"{path} ({len(files)} files, {count:,} {by})"
    return _long_enough(Corpus(train, validation, token_limit, source, size / count), length)


def _tokens(texts: list[bytes], tokenizer: str | None) -> list[NDArray[np.integer]]:
    """The tokens of each text; of a tokenizer without special tokens, but for the end of each text if it has one."""
    if tokenizer in (None, BYTES):
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]
    from transformers import AutoTokenizer  # an optional dependency

    made = AutoTokenizer.from_pretrained(tokenizer, model_max_length=10**15)  # texts are cut later
    end = [] if made.eos_token_id is None else [made.eos_token_id]
    found = (made(text.decode(errors="replace"), add_special_tokens=False)["input_ids"] for text in texts)
    return [np.array([*ids, *end], dtype=np.int32) for ids in found]


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    own = [f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.relative_to(root).parts)]
    return sorted(own)


def _text_files(path: Path) -> list[Path]:
    """Text files at or below `path`, sorted; no hidden files, none with a zero byte in the first 8 KB (git's rule)."""
    if not path.exists():
        raise ValueError(f"data.path={str(path)!r}: does not exist; must be a folder of text or a text file")
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


def _token_file(settings: DataSettings) -> NDArray[np.integer]:
    """The tokens in a file, mapped into memory and not read."""
    if settings.path is None or not Path(settings.path).is_file():
        raise ValueError(f"data.path={settings.path!r}: must be a file of tokens")
    path, dtype = Path(settings.path), settings.dtype
    if path.suffix == ".npy":
        return _numpy_file(path, dtype)
    if dtype not in TOKEN_DTYPES:
        raise ValueError(f"data.dtype={dtype!r}: a token file other than .npy needs one of {', '.join(TOKEN_DTYPES)}")
    item = np.dtype(dtype).itemsize
    if path.stat().st_size % item or path.stat().st_size == 0:
        raise ValueError(
            f"data.path={str(path)!r}: {path.stat().st_size} bytes, must be a multiple of {item} ({dtype})"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _numpy_file(path: Path, dtype: str | None) -> NDArray[np.integer]:
    try:
        stream = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"data.path={str(path)!r}: is no .npy file of numbers: {error}") from error
    if stream.ndim != 1 or stream.dtype.name not in TOKEN_DTYPES:
        raise ValueError(
            f"data.path={str(path)!r}: has shape {stream.shape} and dtype {stream.dtype}; must have one dimension, and "
            f"one of {', '.join(TOKEN_DTYPES)}"
        )
    if dtype not in (None, stream.dtype.name):
        raise ValueError(f"data.dtype={dtype!r}: the file {path} has {stream.dtype}; leave data.dtype out")
    return stream


def _tail(stream: NDArray[np.integer], share: float) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Split a single stream: its tail is for validation."""
    border = int(stream.size * (1 - share))
    return stream[:border], stream[border:]


def _long_enough(corpus: Corpus, length: int) -> Corpus:
    for name, stream in (("training", corpus.train), ("validation", corpus.validation)):
        if stream.size < length + 1:
            raise ValueError(
                f"data {corpus.source}: {stream.size} tokens for {name}, must be > sequence_length={length}"
            )
    return corpus
