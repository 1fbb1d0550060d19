"""All ranks write the tensors of one checkpoint; rank 0 checks from their reports that nothing is missing."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from hecate.checkpoint.cover import check_stored
from hecate.checkpoint.manifest import FileProof, Files
from hecate.checkpoint.rows import ExpertsSavePlanner
from hecate.checkpoint.state import Entry
from hecate.ranks.agree import PrivateRanks

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ProvingWriter", "write_entries"]


class _Stream(io.BufferedWriter):
    """A file being written, which counts its bytes and computes its checksums."""

    def __init__(self, path: Path, sha256: bool) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._num_bytes = self._crc32 = 0
        self._sha256 = hashlib.sha256() if sha256 else None

    def write(self, data: Buffer) -> int:
        self._crc32 = zlib.crc32(data, self._crc32)
        self._num_bytes += memoryview(data).nbytes
        if self._sha256 is not None:
            self._sha256.update(data)
        return super().write(data)

    @property
    def proof(self) -> FileProof:
        return FileProof(self._num_bytes, self._crc32, None if self._sha256 is None else self._sha256.hexdigest())


class _ProvenFiles(FileSystem):
    """File system for DCP's writer that records size and checksums of each file written."""

    def __init__(self, sha256: bool) -> None:
        self.files: dict[str, FileProof] = {}
        self._sha256 = sha256

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "wb", mode
        with _Stream(Path(path), self._sha256) as stream:
            yield stream
        self.files[Path(path).name] = stream.proof

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class ProvingWriter(FileSystemWriter):
    """DCP's file writer with fsync, which records size and checksums of each file.

    Args:
        folder: folder to write to.
        sha256: whether to also compute the SHA-256 of each file.
    """

    def __init__(self, folder: Path, sha256: bool) -> None:
        super().__init__(folder, sync_files=True)
        self.folder = folder
        self.fs = _ProvenFiles(sha256)

    @property
    def files(self) -> Files:
        """The files that this rank has written."""
        return cast(_ProvenFiles, self.fs).files


@dataclass(frozen=True)
class _Proof:
    """One rank's report: the files it wrote, and the place of each tensor chunk in them."""

    files: Files
    chunks: Sequence[WriteResult]


def write_entries(where: str, entries: Mapping[str, Entry], writer: ProvingWriter, ranks: PrivateRanks) -> Files:
    """Write the tensors of all ranks. Collective.

    Does what `dcp.save` does with the same planner and writer. But `dcp.save` looks up the default process group at
    every stage, so it fails once the group is destroyed; this function uses only `ranks`.

    Returns:
        The files written: on rank 0 those of all ranks, elsewhere this rank's.

    Raises:
        OSError: a rank could not write; raised on all ranks.
        ValueError: the chunks written do not cover every tensor exactly once; raised on all ranks.
    """
    planner, first = ExpertsSavePlanner(), ranks.rank == 0
    local = ranks.to_rank_0(ranks.agree(lambda: _local_plan(dict(entries), planner, writer, ranks)))
    plans, metadata = ranks.agree(lambda: _global_plans(local, planner, writer) if first else ([], None))
    plan = ranks.from_rank_0(plans)
    proofs = ranks.to_rank_0(ranks.agree(lambda: _write(f"{where}: rank {ranks.rank}", plan, planner, writer)))
    return ranks.agree(lambda: writer.files if metadata is None else _finish(where, writer, metadata, proofs))


def _local_plan(
    entries: dict[str, Entry], planner: ExpertsSavePlanner, writer: ProvingWriter, ranks: PrivateRanks
) -> SavePlan:
    """What this rank could write, before duplicates across ranks are removed."""
    writer.reset()
    planner.set_up_planner(entries, writer.storage_meta(), ranks.rank == 0)
    writer.set_up_storage_writer(ranks.rank == 0, rank=ranks.rank, use_collectives=True)
    return writer.prepare_local_plan(planner.create_local_plan())


def _global_plans(
    local: list[SavePlan], planner: ExpertsSavePlanner, writer: ProvingWriter
) -> tuple[list[SavePlan], Metadata | None]:
    """What each rank must write, such that data held by several ranks is written by one of them; and the metadata."""
    plans, metadata = planner.create_global_plan(local)
    return writer.prepare_global_plan(plans), metadata


def _write(where: str, plan: SavePlan, planner: ExpertsSavePlanner, writer: ProvingWriter) -> _Proof:
    try:
        chunks = writer.write_data(planner.finish_plan(plan), planner).wait()
    except Exception as error:  # torch.save raises other types for file errors
        raise OSError(f"{where}: {error!r}") from error
    return _Proof(writer.files, chunks)


def _finish(where: str, writer: ProvingWriter, metadata: Metadata, proofs: Sequence[_Proof]) -> Files:
    """Write the metadata; ValueError unless the ranks' chunks cover every tensor exactly once."""
    files = {name: proof for rank in proofs for name, proof in rank.files.items()}
    writer.finish(metadata, [list(rank.chunks) for rank in proofs])
    # Some versions of torch (2.11) fill a copy of the metadata.
    metadata.storage_data = {chunk.index: chunk.storage_data for rank in proofs for chunk in rank.chunks}
    if len(metadata.storage_data) != sum(len(rank.chunks) for rank in proofs):
        raise ValueError(f"{where}: two ranks wrote the same chunk of a tensor")
    sizes = {name: proof.num_bytes for name, proof in files.items()}
    check_stored(where, metadata, metadata.state_dict_metadata, sizes)
    return files | dict(writer.files)
