"""Whether the records of a small zip archive have the CRC-32s that it carries.

zipfile tells that, too, and takes a fifth of a millisecond for an archive: of a checkpoint with 100,000 of them that is all one
waits for. It is asked about whatever is not plain, and whenever something is wrong.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

_END = struct.Struct("<4s4H2IH")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_LOCAL = struct.Struct("<4s5H3I2H")
_LARGE = 0xFFFFFFFF  # of a record that stands in the fields of zip64
_NEWEST = 45  # version of the format: that with zip64
_FLAGS = 0x808  # that sizes stand behind the record, too, and that names are UTF-8


def first_bad_record(content: bytes | bytearray) -> str | None:
    """Its name; None: all are good.

    Raises:
        zipfile.BadZipFile, EOFError, NotImplementedError, ValueError: it is no such archive.
    """
    if _is_good(memoryview(content)):
        return None
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.testzip()


def has_checksums(content: bytes | bytearray) -> bool:
    """Whether any of its records has one: torch leaves out those of all, or of none (`torch.serialization.set_crc32_options`).

    Raises:
        zipfile.BadZipFile, NotImplementedError, ValueError: it is no such archive.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return any(entry.CRC for entry in archive.infolist())


def _is_good(content: memoryview) -> bool:
    """False: it is not, or that cannot be told here."""
    at = len(content) - _END.size
    if at < 0:
        return False
    mark, disk, first, here, count, size, begin, comment = _END.unpack_from(content, at)
    end, entry = begin + size, begin
    if (mark, disk, first, here, comment) != (b"PK\x05\x06", 0, 0, count, 0) or count == 0xFFFF or end > at:
        return False
    if end != at and not _is_same_in_zip64(content[end:at], count, size, begin, end):
        return False
    for _ in range(count):
        if entry + _ENTRY.size > end:
            return False
        name_bytes = _record_at(content, entry)
        if name_bytes is None:
            return False
        entry += _ENTRY.size + name_bytes
    return entry == end


def _is_same_in_zip64(between: memoryview, count: int, size: int, begin: int, end: int) -> bool:
    """torch writes these, too."""
    if len(between) != _END_64.size + _LOCATOR.size:
        return False
    mark, length, _, version, *rest = _END_64.unpack_from(between)
    said = mark, length, version <= _NEWEST, rest
    return said == (b"PK\x06\x06", _END_64.size - 12, True, [0, 0, count, count, size, begin]) and (
        _LOCATOR.unpack_from(between, _END_64.size) == (b"PK\x06\x07", 0, end, 1)
    )


def _record_at(content: memoryview, entry: int) -> int | None:
    """How long the name is in this entry of the directory, if all is well with its record."""
    (mark, _, version, flags, method, _, _, crc, packed, size, *lengths, _, _, _, local) = _ENTRY.unpack_from(content, entry)
    name, *others = lengths
    if mark != b"PK\x01\x02" or version > _NEWEST or method or flags & ~_FLAGS or packed != size or any(others):
        return None
    if _LARGE in (size, local) or local + _LOCAL.size > len(content):
        return None
    own_mark, *_, own_name, own_extra = _LOCAL.unpack_from(content, local)
    names = [content[at : at + name] for at in (entry + _ENTRY.size, local + _LOCAL.size)]
    begin = local + _LOCAL.size + own_name + own_extra
    if own_mark != b"PK\x03\x04" or own_name != name or names[0] != names[1] or not bytes(names[0]).isascii():
        return None
    is_good = begin + size <= len(content) and zlib.crc32(content[begin : begin + size]) == crc
    return name if is_good else None
