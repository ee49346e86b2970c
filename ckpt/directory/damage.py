"""Where a file is damaged that is not what its manifest says, and whether other files have the same blocks there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ckpt import _native
from ckpt.directory.manifest import FileEntry
from ckpt.directory.sharded_files import PieceChecksums, checksums_path
from ckpt.errors import CheckpointError, CorruptError
from ckpt.storage.extents import common_bytes, extents_of

_THREADS = 8
_TIMEOUT_S = 24 * 3600.0


class Role(NamedTuple):
    """What a file is in its checkpoint: the `number`-th of its kind and rank. In the next one it may have another name."""

    kind: str
    rank: int
    number: int


def roles_of(files: Iterable[FileEntry]) -> dict[Role, FileEntry]:
    counted: Counter[tuple[str, int]] = Counter()
    found = {}
    for file in files:
        found[Role(file.kind, file.rank, counted[file.kind, file.rank])] = file
        counted[file.kind, file.rank] += 1
    return found


def where_damaged(path: Path) -> CheckpointError | OSError | None:
    """The error that names the first damaged record of a torch file, or piece of one that has checksums beside it. It is read
    once more. None if that cannot be told.
    """
    try:
        beside = checksums_path(path)
        if path.suffix == ".distcp" and beside.exists():
            return _first_bad_piece(path, PieceChecksums.parse(beside.read_bytes()))
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                return None
        _native.verify_torch_file(os.fsencode(path), _THREADS)
    except (CheckpointError, OSError) as error:
        return error
    return None


def _first_bad_piece(path: Path, checksums: PieceChecksums) -> CorruptError | None:
    size, end = checksums.piece_bytes, checksums.file_bytes
    ranges = [(at, min(size, end - at), 0, -1) for at in range(0, end, size)]
    file = _native.RangeFile(os.fsencode(path), True)
    crcs = file.read(ranges, threads=_THREADS, timeout_s=_TIMEOUT_S, keep=None)
    for (at, length, *_), found, expected in zip(ranges, crcs, checksums.crc32s, strict=True):
        if found != expected:
            error = CorruptError(f"'{path}' fails a CRC-32: some of its bytes {at} to {at + length - 1} have changed")
            error.bytes_at = at, at + length
            return error
    return None


def have_common_blocks(path: Path, other: Path, begin: int, end: int) -> bool:
    """Whether bytes begin..end of both files are, in part or all, the same on the device: what damages one damages the other.

    No if the file system does not tell it, but for two names of one file.
    """
    try:
        if os.path.samefile(path, other):
            return True
        ours, theirs = extents_of(path), extents_of(other)
    except OSError:
        return False
    return bool(ours and theirs and common_bytes(ours, theirs, begin, end))
