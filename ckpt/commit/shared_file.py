"""One file written by all ranks together: what each says of its share, and how rank 0 makes a file of them.

The layout is the same everywhere, so each rank writes whole chunks of its own. What no rank knows alone are the checksums of
all records: the central directory, which has them, is written last, by rank 0.
"""

from __future__ import annotations

import array
import base64
import dataclasses
import os
from collections.abc import Iterable, Sequence

from ckpt import _native
from ckpt.errors import CorruptError, StorageError
from ckpt.saving.file_in_flight import FileInFlight


@dataclasses.dataclass(frozen=True)
class WrittenShare:
    """Bytes [begin, end) of the file, their CRC-32, and the CRC-32s of the records that end there, as texts of numbers.

    Attributes:
        read: of a record that ends there and began before: what was read of it, for its checksum, and others have written. Its
            number, bytes and CRC-32; 0 bytes if there is none.
        written: the same of what was written of the last record.
        reused, step: so many bytes are not written, but in blocks that are shared with the checkpoint of that step.
    """

    begin: int
    end: int
    crc: int
    records: str
    crcs: str
    inode: int
    read: Sequence[int]
    written: Sequence[int]
    reused: int = 0
    step: int = 0


def share_of(file: FileInFlight) -> WrittenShare:
    """What this rank has written.

    Raises:
        StorageError: the file is gone.
    """
    records, crcs = file.job.checksums
    begin, end = file.job.written
    try:
        inode = os.stat(file.temporary).st_ino
    except OSError as error:
        raise StorageError(
            error.errno or 0,
            f"'{file.temporary}' is gone: rank 0 has given this save up already, or does not see the same directory",
            str(file.temporary),
        ) from error
    read, written = file.job.edges
    details = (begin, end, file.job.crc32, _pack(records), _pack(crcs), inode, read, written)
    reused = file.reused_bytes
    return WrittenShare(*details, reused, (file.offer.step or 0) if reused else 0)


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """Rank `reader` holds other bytes of a record than those ranks have written that write it before."""

    record: int
    writers: tuple[int, ...]
    reader: int


def find_disagreement(shares: Sequence[WrittenShare]) -> Disagreement | None:
    """The first one. A file whose shares do not agree would have records that fail their checksums.

    Who writes the end of a record finds the checksum of all of it in its own memory. So all of the record is compared but the
    last rank's part, and what is published is all that rank's.
    """
    record, length, crc = 0, 0, 0  # what has been written of the last record
    writers: tuple[int, ...] = ()
    for rank, share in enumerate(shares):
        if share.read[1] and list(share.read) != [record, length, crc]:
            return Disagreement(share.read[0], writers, rank)
        if not share.written[1]:
            continue
        if share.written[0] != record or not length:
            record, length, crc, writers = share.written[0], 0, 0, ()
        length += share.written[1]
        crc = _native.crc32_combine(crc, share.written[2], share.written[1])
        writers += (rank,)
    return None


def join_shares(file: FileInFlight, shares: Sequence[WrittenShare]) -> int:
    """Writes the end of the file, durably; returns the CRC-32 of all of it.

    Raises:
        StorageError: it cannot be written.
        CorruptError: the shares do not make one file.
    """
    record_crcs = [0] * file.job.record_count
    whole = at = 0
    for rank, share in enumerate(shares):
        if share.inode != shares[0].inode:
            raise CorruptError(f"rank {rank} has written to another file than rank 0: all ranks must see the same directory")
        if share.begin != at or share.end < share.begin:
            raise CorruptError(f"rank {rank} has written bytes {share.begin} to {share.end} where {at} was expected")
        whole, at = _native.crc32_combine(whole, share.crc, share.end - share.begin), share.end
        for record, crc in zip(_unpack(share.records), _unpack(share.crcs), strict=True):
            record_crcs[record] = crc
    offset, directory = file.job.directory(record_crcs)
    if offset != at:
        raise CorruptError(f"the ranks have written {at} bytes before the directory, which lies at {offset}")
    _native.write_end(os.fsencode(file.temporary), offset, directory)
    return _native.crc32(directory, whole)


def _pack(numbers: Iterable[int]) -> str:
    return base64.b85encode(array.array("I", numbers).tobytes()).decode()


def _unpack(text: str) -> array.array[int]:
    return array.array("I", base64.b85decode(text))
