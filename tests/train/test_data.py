"""Tokens from folders and files: the split, the order, the position, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hecate.train.data import Corpus, load_corpus
from hecate.train.settings import DataSettings


def settings(path: Path | None, dtype: str | None = None, share: float = 0.25) -> DataSettings:
    kind = "text" if dtype is None and (path is None or path.suffix not in (".bin", ".npy")) else "tokens"
    return DataSettings(
        kind=kind, path=None if path is None else str(path), dtype=dtype, validation_share=share, bytes_per_token=1
    )


def folder_of_text(root: Path, files: int = 40) -> Path:
    for i in range(files):
        (root / f"part{i % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"part{i % 3}" / f"{i}.txt").write_bytes(bytes([i]) * (20 + i) if i else b"")
    return root


def ramp() -> Corpus:
    return Corpus(np.arange(1000, dtype=np.uint16), np.arange(500, dtype=np.uint16), 1000, "ramp")


def test_files_are_split_without_overlap_and_the_same_way_everywhere(tmp_path: Path) -> None:
    first = load_corpus(settings(folder_of_text(tmp_path / "a" / "here")), 8, 256)
    second = load_corpus(settings(folder_of_text(tmp_path / "elsewhere")), 8, 256)
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.validation, second.validation)
    train, validation = set(first.train.tolist()), set(first.validation.tolist())
    assert not train & validation
    assert train | validation == set(range(1, 40))
    assert 4 <= len(validation) <= 16


def test_a_new_file_moves_no_other_file(tmp_path: Path) -> None:
    root = folder_of_text(tmp_path)
    before = set(load_corpus(settings(root), 8, 256).validation.tolist())
    (root / "new.txt").write_bytes(bytes([99]) * 50)
    assert set(load_corpus(settings(root), 8, 256).validation.tolist()) - {99} == before


def test_two_files_give_one_to_each_side(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 50)
    (tmp_path / "b.txt").write_bytes(b"b" * 50)
    corpus = load_corpus(settings(tmp_path, share=0.01), 8, 256)
    assert {corpus.train.tobytes()[:1], corpus.validation.tobytes()[:1]} == {b"a", b"b"}


def test_one_file_is_split_at_its_tail(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 201)))
    for path in (tmp_path, tmp_path / "a.txt"):
        corpus = load_corpus(settings(path), 8, 256)
        assert corpus.train.tolist() == list(range(1, 151))
        assert corpus.validation.tolist() == list(range(151, 201))


def test_binary_and_hidden_files_are_no_text(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"h" * 100)
    (tmp_path / "image").write_bytes(b"\0" * 100)
    (tmp_path / "a.txt").write_bytes(b"a" * 100)
    corpus = load_corpus(settings(tmp_path), 8, 256)
    assert set(corpus.train.tolist()) | set(corpus.validation.tolist()) == {ord("a")}


def test_default_is_the_standard_library() -> None:
    corpus = load_corpus(settings(None, share=0.05), 256, 256)
    assert corpus.train.size > 10 * corpus.validation.size > 1_000_000
    assert b"import" in corpus.validation[:200_000].tobytes()


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_token_file_is_mapped_with_its_dtype(tmp_path: Path, dtype: str) -> None:
    np.arange(400, dtype=dtype).tofile(tmp_path / "t.bin")
    corpus = load_corpus(settings(tmp_path / "t.bin", dtype), 8, 400)
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.tolist() == list(range(300))
    batch = corpus.training_batch(0, 0, 4, 8)
    assert batch.dtype == torch.int64
    assert (batch[:, 1:] == batch[:, :-1] + 1).all()


def test_numpy_file_is_mapped_with_the_dtype_in_its_header(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(400, dtype=np.int32))
    for dtype in (None, "int32"):
        corpus = load_corpus(settings(tmp_path / "t.npy", dtype), 8, 400)
        assert isinstance(corpus.train, np.memmap)
        assert corpus.train.tolist() == list(range(300))


def test_sequence_is_a_function_of_seed_and_position() -> None:
    corpus = ramp()
    together = corpus.training_batch(7, 10, 6, 16)
    assert torch.equal(torch.cat([corpus.training_batch(7, 10, 2, 16), corpus.training_batch(7, 12, 4, 16)]), together)
    assert not torch.equal(corpus.training_batch(8, 10, 6, 16), together)
    assert len(together[:, 0].unique()) > 1


def test_starts_cover_the_stream_to_its_last_token() -> None:
    starts = ramp().training_batch(0, 0, 20_000, 990)[:, 0]
    assert sorted(set(starts.tolist())) == list(range(10))


def test_validation_sequences_are_spread_and_may_be_none() -> None:
    corpus = ramp()
    whole = corpus.validation_batch(range(5), 5, 19)
    assert whole[:, 0].tolist() == [0, 120, 240, 360, 480]
    assert torch.equal(whole[1::2], corpus.validation_batch(range(1, 5, 2), 5, 19))
    assert corpus.validation_batch(range(5, 5), 5, 19).shape == (0, 20)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "t.bin")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "short.txt").write_bytes(b"short")
    np.save(tmp_path / "table.npy", np.zeros((2, 3)))
    np.save(tmp_path / "ids.npy", np.zeros(3, np.uint16))
    for path, dtype, message in (
        (tmp_path / "nowhere", None, "nowhere'?: does not exist; must be a folder"),
        (tmp_path / "empty", None, "empty'?: has no text"),
        (tmp_path / "t.bin", None, "dtype=None: a token file other than .npy needs one of uint8, uint16"),
        (tmp_path / "short.txt", "uint16", "5 bytes, must be a multiple of 2"),  # never read as text
        (tmp_path / "table.npy", None, r"has shape \(2, 3\) and dtype float64; must have one dimension"),
        (tmp_path / "ids.npy", "int32", "dtype='int32': the file .* has uint16"),
        (tmp_path / "none.npy", None, "must be a file of tokens"),
        (tmp_path / "odd.bin", "uint16", "3 bytes, must be a multiple of 2"),
        (tmp_path / "short.txt", None, "3 tokens for training, must be > sequence_length=8"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus(settings(path, dtype), 8, 256)


@pytest.mark.parametrize("name", ["t.bin", "t.npy"])
def test_tokens_are_never_read_as_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"abc" * 99)
    with pytest.raises(ValueError, match=rf"a \{Path(name).suffix} file holds tokens; set data=tokens"):
        load_corpus(DataSettings("text", str(tmp_path / name), None, 0.25), 8, 256)


def test_token_beyond_the_vocabulary_is_named() -> None:
    corpus = Corpus(np.arange(300, dtype=np.uint16), np.arange(300, dtype=np.uint16), 256, "t.bin")
    with pytest.raises(ValueError, match=r"reach from 0 to 299, must be in \[0, 256\)"):
        corpus.validation_batch(range(1), 1, 299)


def test_text_by_a_tokenizer(tmp_path: Path) -> None:
    words = {"<unk>": 0, "<end>": 1, "the": 2, "cat": 3}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / name).write_text("the cat the dog ")  # 16 bytes, 5 tokens with that of the end
    given = DataSettings("text", str(tmp_path / "text"), None, 0.5, tokenizer=str(tmp_path / "tokenizer"))
    corpus = load_corpus(given, 4, 4)
    assert corpus.train.tolist() == corpus.validation.tolist() == [2, 3, 2, 0, 1]
    assert corpus.bytes_per_token == 32 / 10
    assert corpus.source.endswith(f"text (2 files, 10 tokens by {tmp_path / 'tokenizer'})")
    assert load_corpus(replace(given, tokenizer="bytes"), 4, 256).bytes_per_token == 1
