"""The data files of a checkpoint that torch.distributed.checkpoint itself has planned: this rank's tensors, and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ckpt import _native
from ckpt.directory import dcp_directory
from ckpt.directory.dcp_directory import DcpDirectory
from ckpt.directory.sharded_files import PieceChecksums, checksums_path
from ckpt.formats.tensors_file import TensorsFile
from ckpt.options import Options
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.pending import PendingSave
from ckpt.saving.piece_sums import checksums_of
from ckpt.saving.runtime import keep
from ckpt.saving.submit import log_failure, start
from ckpt.saving.task import SaveTask
from ckpt.storage import durable

_PIECE_BYTES = 256 << 10  # as of the other data files

Place = tuple[str, int, int]  # name of the file, offset and length in it


@dataclasses.dataclass(frozen=True)
class ItemFiles:
    """Of one rank, on their way.

    Attributes:
        pending: durable under their own names when it has its result.
        tensors, blobs: where each lies.
    """

    pending: PendingSave | None
    tensors: list[Place]
    blobs: list[Place]


class ItemWriter:
    """Writes them, to files that no file of the directory is called like. Of one rank, for one directory.

    Args:
        rank: goes into the names.
    """

    def __init__(self, directory: Path, rank: int, options: Options | None = None) -> None:
        self._directory = DcpDirectory(directory, locks=False)
        self._rank = rank
        self._options = options or Options()

    def write(self, tensors: Sequence[tuple[torch.Tensor, bool]], blobs: Sequence[bytes]) -> ItemFiles:
        """
        Args:
            tensors: each with whether its memory stays as it is until the result is there. What does not stay must not change
                before the next fence.
            blobs: written as they are.

        Raises:
            StorageError and others, as ckpt.save().
        """
        durable.make_directory(self._directory.path, durable=False)
        pending, placed = self._write_tensors(tensors) if tensors else (None, [])
        try:
            return ItemFiles(pending, placed, self._write_blobs(blobs))
        except BaseException:
            if pending is not None:
                pending.exception()  # its memory may be written to once we have raised
            self.discard(sorted({name for name, _, _ in placed}))
            raise

    def _write_tensors(self, tensors: Any) -> tuple[PendingSave, list[Place]]:
        target = self._directory.take_name(self._rank)
        file = FileInFlight(target, made=TensorsFile())
        task = SaveTask(target, on_done=log_failure)

        def publish(error: BaseException | None) -> Path:
            if error is not None:
                raise error
            dcp_directory.place(file.temporary, target, checksums_of(file))
            return target

        options = dataclasses.replace(self._options, when_busy="wait")
        start(*keep(options), task, [(file, tensors, True)], publish, lazy=True, options=options)
        return PendingSave(task), [(target.name, at, length) for at, length in file.job.archives]

    def _write_blobs(self, blobs: Sequence[bytes]) -> list[Place]:
        if not blobs:
            return []
        target, content, places = self._directory.take_name(self._rank), b"".join(blobs), []
        at = 0
        for blob in blobs:
            places.append((target.name, at, len(blob)))
            at += len(blob)
        crc32s = [_native.crc32(content[at : at + _PIECE_BYTES]) for at in range(0, len(content), _PIECE_BYTES)]
        temporary = durable.temporary_path(target)
        try:
            durable.write_small_file(temporary, content)
            dcp_directory.place(temporary, target, PieceChecksums(len(content), _PIECE_BYTES, crc32s).to_bytes())
        except BaseException:
            durable.remove_quietly(temporary)
            raise
        return places

    def discard(self, names: Sequence[str]) -> None:
        """Removes files that will not be published."""
        for name in names:
            dcp_directory.remove(self._directory.path / name)


def publish_metadata(directory: Path, metadata: bytes, data_files: Mapping[str, int]) -> None:
    """Makes files that are durable a checkpoint for readers of torch, at once, and removes those of the one before.

    Args:
        data_files: by name, how many bytes of each are used.

    Raises:
        CorruptError: one is not there: somebody else saves to the directory, or not all ranks see the same one.
        StorageError: a system call failed.
    """
    place, sealed = DcpDirectory(directory, locks=False), dcp_directory.seal(metadata)
    checksums = {checksums_path(Path(name)).name: 1 for name in data_files}
    place.publish(sealed, None, {**data_files, **checksums})
    place.tidy(sealed, data_files)
