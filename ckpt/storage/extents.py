"""Where the bytes of a file lie on its device, as the file system tells it (FIEMAP): so files that share blocks are found."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import NamedTuple

_FIEMAP = 0xC020660B
_HEAD = struct.Struct("=QQLLLL")  # start, length, flags, how many are mapped, room for so many, reserved
_EXTENT = struct.Struct("=QQQQQLLLL")  # logical, physical, length, two reserved, flags, three reserved
_AT_ONCE = 256
_LAST, _SHARED = 0x1, 0x2000
_NOWHERE = 0x2 | 0x4 | 0x200  # not known, not written yet, or inside the metadata of the file: there is no address
# That the file system has no such thing, or not for this file.
_NONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EBADR)


class Extent(NamedTuple):
    """
    Attributes:
        begin, end: bytes of the file.
        at: address on the device, bytes; None: it has none.
        shared: whether the file system knows others that have these blocks, too.
    """

    begin: int
    end: int
    at: int | None
    shared: bool


def extents_of(path: Path) -> list[Extent] | None:
    """In the order of the file, without its holes; None if the file system does not tell it.

    Raises:
        OSError: the file cannot be opened, or asked.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return _extents(descriptor)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    finally:
        os.close(descriptor)


def _extents(descriptor: int) -> list[Extent]:
    found: list[Extent] = []
    begin = 0
    while True:
        head = _HEAD.pack(begin, (1 << 64) - 1 - begin, 0, 0, _AT_ONCE, 0)
        request = array.array("B", head + bytes(_EXTENT.size * _AT_ONCE))
        fcntl.ioctl(descriptor, _FIEMAP, request)
        count = _HEAD.unpack_from(request)[3]
        flags = _LAST
        for index in range(count):
            logical, physical, length, _, _, flags, *_ = _EXTENT.unpack_from(request, _HEAD.size + _EXTENT.size * index)
            at = None if flags & _NOWHERE else physical
            found.append(Extent(logical, logical + length, at, bool(flags & _SHARED)))
            begin = logical + length
        if flags & _LAST:
            return found


def common_bytes(of: list[Extent], other: list[Extent], begin: int, end: int) -> int:
    """How many of the bytes begin..end of one file lie in the same blocks as the same bytes of another."""
    common, index = 0, 0
    for extent in of:
        while index < len(other) and other[index].end <= extent.begin:
            index += 1
        for each in other[index:]:
            first, last = max(begin, extent.begin, each.begin), min(end, extent.end, each.end)
            if each.begin >= extent.end:
                break
            if first < last and extent.at is not None and each.at is not None:
                common += (last - first) * (extent.at - extent.begin == each.at - each.begin)
    return common
