"""Copies what one node delivers of one file: each byte is read once, checked, and written once."""

from __future__ import annotations

import copy
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from ckpt import _native
from ckpt.drain.journal import Progress
from ckpt.drain.pacing import Pace
from ckpt.drain.parts import Part
from ckpt.drain.stopping import Stop, StoppedError
from ckpt.errors import CheckpointError, CorruptError, StorageError
from ckpt.storage import durable
from ckpt.storage.block_files import Block, BlockReader, BlockWriter

_CHUNK_BYTES = 8 << 20
_NOTE_EVERY_BYTES = 64 << 20  # how much may be copied again after an end
_NOTE_EVERY_S = 1.0
UNFINISHED = ".part"


class SourceError(StorageError):
    """The file on the node cannot be read."""


def part_path(final: Path) -> Path:
    """Where a file is as long as it is not whole. The same for all who write it, and after every restart."""
    return final.with_name(final.name + UNFINISHED)


class Copier:
    """
    Args:
        direct: whether to go past the page cache, where that can be done.
        note: called when what was copied so far is durable, with how many bytes of it are new at home.
    """

    def __init__(self, pace: Pace, stop: Stop, direct: bool, note: Callable[[int], None]) -> None:
        self._pace = pace
        self._stop = stop
        self._direct = direct
        self._note = note
        self._block = Block(_CHUNK_BYTES)

    def close(self) -> None:
        self._block.close()

    def copy(self, source: Path, final: Path, part: Part, progress: Progress) -> None:
        """Goes on where `progress` says. A file of this node alone has its name afterwards; its directory is not synced.

        Raises:
            CorruptError: the file on the node is not what its manifest says.
            SourceError: it cannot be read.
            StorageError: the one at home cannot be written.
            StoppedError: see there.
        """
        target = part_path(final)
        if progress.done == 0 or not _goes_on(target, part, progress):
            _begin_anew(progress)
        try:
            self._copy_rest(source, target, part, progress)
        except CorruptError as error:
            # What was noted may be wrong, or what was read: before a file is called damaged, it is read by itself.
            if not _is_sound(source, part):
                raise
            _begin_anew(progress)
            try:
                self._copy_rest(source, target, part, progress)
            except CorruptError:
                raise SourceError(errno.EIO, f"reads of '{source}' differ: {error}", str(source)) from error
        durable.crash_point("drain-copied")
        if not part.shared:
            durable.give_name(target, final)
        progress.finished = True
        durable.crash_point("drain-named")

    def _copy_rest(self, source: Path, target: Path, part: Part, progress: Progress) -> None:
        durable_so_far = copy.copy(progress)
        try:
            with self._open(source) as reader, BlockWriter(target, direct=self._direct) as writer:
                if reader.size != part.entry.bytes:
                    raise CorruptError(f"'{source}' has {reader.size} bytes where {part.entry.bytes} were expected")
                unnoted = self._copy_chunks(reader, writer, part, progress, durable_so_far)
                if progress.crc32 != part.entry.crc32:
                    crcs = f"{progress.crc32:08x} where {part.entry.crc32:08x} was expected"
                    raise CorruptError(f"'{source}' has the CRC-32 {crcs}: it is damaged")
                writer.finish(part.entry.bytes if part.is_last else None)
        except StorageError:
            _assign(progress, durable_so_far)  # what was written since may be lost, whatever the next sync says
            raise
        self._note(unnoted)

    def _copy_chunks(
        self, reader: BlockReader, writer: BlockWriter, part: Part, progress: Progress, durable_so_far: Progress
    ) -> int:
        """Returns how many bytes were written that are not noted yet."""
        unnoted, noted_at = 0, time.monotonic()
        while progress.done < part.entry.bytes:
            unnoted += self._copy_chunk(reader, writer, part, progress)
            durable.crash_point("drain-chunk")
            due = unnoted >= _NOTE_EVERY_BYTES or time.monotonic() - noted_at >= _NOTE_EVERY_S
            if due or self._stop.requested:
                writer.sync()
                _assign(durable_so_far, progress)
                self._note(unnoted)
                durable.crash_point("drain-noted")
                unnoted, noted_at = 0, time.monotonic()
            if self._stop.requested:
                raise StoppedError("the drain was asked to end")
        return unnoted

    def _copy_chunk(self, reader: BlockReader, writer: BlockWriter, part: Part, progress: Progress) -> int:
        """Returns how many bytes were written."""
        offset = progress.done
        begin, end = (min(max(edge - offset, 0), self._block.size) for edge in (part.begin, part.end))
        self._pace.wait(end - begin)
        began = time.monotonic()
        count = self._read(reader, offset)
        end = min(end, count)
        crc = _native.crc32(self._block.memory[:count], progress.crc32)
        part_crc = progress.part_crc32
        if begin < end:
            part_crc = _native.crc32(self._block.memory[begin:end], part_crc) if part.shared else crc
            writer.write(self._block, begin, end, offset + begin)
        progress.done, progress.crc32, progress.part_crc32 = offset + count, crc, part_crc
        self._pace.note(end - begin, time.monotonic() - began)
        return max(0, end - begin)

    def _open(self, source: Path) -> BlockReader:
        try:
            durable.refuse_irregular(source, "copy")
            return BlockReader(source, direct=self._direct)
        except StorageError as error:
            raise SourceError(error.errno or 0, str(error), str(source)) from error

    def _read(self, reader: BlockReader, offset: int) -> int:
        try:
            count = reader.read(self._block, offset)
        except StorageError as error:
            raise SourceError(error.errno or 0, str(error), str(reader.path)) from error
        if count == 0:
            raise CorruptError(f"'{reader.path}' ends at byte {offset}")
        return count


def _goes_on(target: Path, part: Part, progress: Progress) -> bool:
    """Whether what is there is as long as it was."""
    written = min(max(progress.done, part.begin), part.end) if part.begin < progress.done else 0
    try:
        return target.stat().st_size >= written
    except OSError:
        return progress.done == 0


def _begin_anew(progress: Progress) -> None:
    _assign(progress, Progress())


def _assign(progress: Progress, other: Progress) -> None:
    vars(progress).update(vars(other))


def _is_sound(source: Path, part: Part) -> bool:
    try:
        return _native.digest_file(os.fsencode(source), 1) == (part.entry.bytes, part.entry.crc32)
    except (OSError, CheckpointError):
        return False
