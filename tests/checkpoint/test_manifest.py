"""Any wrong bit in the manifest or the settings is noticed; SHA-256 is checked if it was requested."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hecate.checkpoint.manifest import read_record, verify
from tests.checkpoint.forge import forge
from tests.checkpoint.runs import Run
from tests.checkpoint.states import assert_like, assert_refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    run = Run()
    run.train(0, 1)
    run.engine.save(path, run.optimizer, sha256=True)
    return path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def flips(data: bytes) -> Iterator[bytes]:
    """One for every bit."""
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


@pytest.mark.parametrize("name", ["manifest.json", "hecate.json"])
def test_every_flipped_bit_is_noticed_or_harmless(checkpoint: Path, name: str) -> None:
    original = (checkpoint / name).read_bytes()
    meaning, harmless, count = json.loads(original), 0, 0
    for data in flips(original):
        (checkpoint / name).write_bytes(data)
        try:
            read_record(checkpoint)
        except ValueError as error:
            assert "checkpoint: file " in str(error)  # noqa: PT017  # there are thousands
            assert name in str(error) or "hecate.json" in str(error)  # noqa: PT017
        else:  # another kind of blank between words
            assert json.loads(data) == meaning
            harmless += 1
        count += 1
    assert count == 8 * len(original)
    assert harmless < count / 20
    assert name == "manifest.json" or harmless == 0


def test_sha256_is_recorded_and_compared(checkpoint: Path) -> None:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert files.keys() == {"__0_0.distcp", ".metadata", "hecate.json"}
    for name, (num_bytes, crc32, sha256) in files.items():
        data = (checkpoint / name).read_bytes()
        assert (len(data), zlib.crc32(data)) == (num_bytes, crc32)
        assert hashlib.sha256(data).hexdigest() == sha256
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(with_crc32(path.read_bytes()[:-8] + b"anything", zlib.crc32(path.read_bytes())))
    assert zlib.crc32(path.read_bytes()) == files["__0_0.distcp"][1]
    assert_refused(Run(), checkpoint, "__0_0.distcp is damaged: .* SHA-256")


def with_crc32(data: bytes, wanted: int) -> bytes:
    """`data` with its first 4 bytes chosen so that the CRC-32 is the wanted one: linear equations over bits."""
    rest = data[4:]

    def crc(first: int) -> int:
        return zlib.crc32(first.to_bytes(4, "little") + rest)

    zero = crc(0)
    rows: dict[int, tuple[int, int]] = {}  # highest bit of an effect -> the effect, and the bits that have it
    for bit in range(32):
        effect, bits = crc(1 << bit) ^ zero, 1 << bit
        while effect and effect.bit_length() in rows:
            other, others = rows[effect.bit_length()]
            effect, bits = effect ^ other, bits ^ others
        rows[effect.bit_length()] = effect, bits
    left, chosen = wanted ^ zero, 0
    while left:
        other, others = rows[left.bit_length()]
        left, chosen = left ^ other, chosen ^ others
    return chosen.to_bytes(4, "little") + rest


def test_without_sha256_by_default(tmp_path: Path) -> None:
    Run().engine.save(tmp_path / "plain")
    files = json.loads((tmp_path / "plain" / "manifest.json").read_text())["files"]
    assert {len(values) for values in files.values()} == {2}


def test_format_1_loads(saved: Path, checkpoint: Path) -> None:
    """A manifest without a digest, as earlier versions wrote it."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {name: values[:2] for name, values in manifest["files"].items()}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=1))
    assert_like(checkpoint, saved)
    data = bytearray((checkpoint / "hecate.json").read_bytes())
    data[10] ^= 1
    (checkpoint / "hecate.json").write_bytes(data)
    assert_refused(Run(), checkpoint, "file hecate.json is damaged")


@pytest.mark.parametrize(
    "text",
    [
        '{"format": true, "files": {}}',
        '{"format": 0, "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"hecate.json": [1, 2]}}',
        '{"format": 1, "files": {"hecate.json": [1.0, 2], ".metadata": [1, 2]}}',
        '{"format": 1, "files": {"hecate.json": {"bytes": 1}, ".metadata": [1, 2]}}',
        '{"format": 2, "files": {"hecate.json": [1, 2], ".metadata": [1, 2]}}',
        '{"format": 1' + "0" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_manifest_of_wrong_types(checkpoint: Path, text: str) -> None:
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"file manifest\.json is damaged"):
        verify(checkpoint, 0, 1)


@pytest.mark.parametrize("where", ["/etc/passwd", "../outside", "link"])
def test_file_outside_of_the_folder(checkpoint: Path, where: str) -> None:
    outside = checkpoint.parent / "outside"
    outside.write_bytes(b"secret")
    (checkpoint / "link").symlink_to(outside)
    data = (checkpoint / where).read_bytes()
    forge(checkpoint, "hecate.json", (checkpoint / "hecate.json").read_bytes())
    manifest = checkpoint / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    manifest.write_text(json.dumps({"format": 1, "files": files | {where: [len(data), zlib.crc32(data)]}}))
    with pytest.raises(ValueError, match=f"file {where} leads out of the folder, which is refused"):
        verify(checkpoint, 0, 1)


def replace_by_link(path: Path) -> None:
    os.rename(path, path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "hecate.json", "manifest.json"])
def test_link_to_a_file_outside(checkpoint: Path, name: str) -> None:
    replace_by_link(checkpoint / name)
    assert_refused(Run(), checkpoint, f"file {name} leads out of the folder")


def test_sha256_in_the_background(tmp_path: Path) -> None:
    handle = Run().engine.save(tmp_path / "checkpoint", async_op=True, sha256=True)
    assert handle is not None
    handle.wait()
    files = json.loads((tmp_path / "checkpoint" / "manifest.json").read_text())["files"]
    assert {len(values) for values in files.values()} == {3}
