"""Gives records in memory to torch.load as a file, by public names alone.

The file exists nowhere: it is a zip whose directory and small records are bytes here. The records of tensors read as zeros,
but for a tag at their beginning, and torch is given the storages with their true contents when it asks where each is to go. So
these are never copied, and need not be on the host, nor filled.
"""

from __future__ import annotations

import bisect
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ckpt.errors import CorruptError
from ckpt.loading.host_memory import bytes_of

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_SEE_EXTRA = 0xFFFFFFFF
_TAG_BYTES = 8

Restore = Callable[[torch.UntypedStorage, str], Any]


class MistakenError(Exception):
    """torch reads files in another order than was assumed."""


class ServedFile(io.RawIOBase):
    """
    Args:
        contents: records that are served as they are.
        sizes: of the others, bytes.
    """

    def __init__(self, contents: Mapping[str, bytes], sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._position = 0
        self._size = 0
        self._begins: list[int] = []
        self._pieces: list[bytes] = []
        self._named: dict[int, str] = {}  # the records that are not served as they are, by where their bytes begin
        self.last: str | None = None  # of these, the one that was read last
        central = [self._add(name, content, len(content)) for name, content in contents.items()]
        central += [self._add(name, None, size) for name, size in sizes.items()]
        self._finish(central)

    def _put(self, piece: bytes, size: int | None = None) -> None:
        self._begins.append(self._size)
        self._pieces.append(piece)
        self._size += len(piece) if size is None else size

    def _add(self, name: str, content: bytes | None, size: int) -> bytes:
        """A record; returns its entry in the directory. Sizes stand in an extra field, whatever they are."""
        path = f"archive/{name}".encode()
        crc, begin = zlib.crc32(content or b""), self._size
        here = struct.pack("<2H2Q", 1, 16, size, size)
        self._put(_LOCAL.pack(b"PK\x03\x04", 45, 0, 0, 0, 0, crc, _SEE_EXTRA, _SEE_EXTRA, len(path), len(here)) + path + here)
        if content is None:
            self._named[self._size] = name
        self._put(tag(name, size) if content is None else content, size)
        extra = struct.pack("<2H3Q", 1, 24, size, size, begin)
        sizes = (_SEE_EXTRA, _SEE_EXTRA, len(path), len(extra), 0, 0, 0, 0, _SEE_EXTRA)
        return _CENTRAL.pack(b"PK\x01\x02", 45, 45, 0, 0, 0, 0, crc, *sizes) + path + extra

    def _finish(self, central: list[bytes]) -> None:
        begin, entries = self._size, b"".join(central)
        count, end = len(central), begin + len(entries)
        self._put(entries)
        self._put(_END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(entries), begin))
        self._put(_LOCATOR.pack(b"PK\x06\x07", 0, end, 1))
        self._put(_END.pack(b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _SEE_EXTRA, _SEE_EXTRA, 0))

    # ---- what torch calls ----

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as room:
            begin = self._position
            end = max(begin, min(self._size, begin + len(room)))
            self._note(begin, end)
            room[: end - begin] = bytes(end - begin)
            for start, piece in self._within(begin, end):
                low, high = max(begin, start), min(end, start + len(piece))
                if low < high:
                    room[low - begin : high - begin] = piece[low - start : high - start]
            self._position = end
            return end - begin

    def _note(self, begin: int, end: int) -> None:
        at = bisect.bisect_right(self._begins, begin) - 1
        if end > begin and self._begins[at] in self._named:
            self.last = self._named[self._begins[at]]

    def _within(self, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        first = max(0, bisect.bisect_right(self._begins, begin) - 1)
        for at in range(first, bisect.bisect_left(self._begins, end)):
            yield self._begins[at], self._pieces[at]


def tag(name: str, size: int) -> bytes:
    """How a record of tensors begins, so that one is not taken for another."""
    number = zlib.crc32(name.encode()) | zlib.adler32(name.encode()) << 32
    return number.to_bytes(_TAG_BYTES, "little")[: min(size, _TAG_BYTES)]


def load_served(
    small: Mapping[str, bytes], storages: Mapping[str, torch.UntypedStorage], weights_only: bool, restore: Restore
) -> Any:
    """What torch.load makes of the records.

    Args:
        small: the records that are not of tensors.
        storages: those that are; the memory of the result.
        restore: puts a storage where it belongs, given the location that was saved.

    Raises:
        MistakenError: this torch cannot be served so.
        CorruptError: the pickle asks for what is not there.
        whatever torch.load raises.
    """
    small = {name: content for name, content in small.items() if name != ".format_version"}  # offsets are other ones here
    if small.get("byteorder", b"little") != b"little":
        # torch swaps bytes before it asks where they are to go: it has to have them.
        file = ServedFile({**small, **{name: bytes_of(storage) for name, storage in storages.items()}}, {})
        return _load(file, restore, weights_only)
    file = ServedFile(small, {name: storage.nbytes() for name, storage in storages.items()})

    def place(storage: torch.UntypedStorage, location: str) -> Any:
        nbytes, name = storage.nbytes(), file.last
        if nbytes == 0:
            return restore(storage, location)
        if name is None:
            raise MistakenError
        if storages[name].nbytes() != nbytes:
            raise CorruptError(f"record '{name}' has {storages[name].nbytes()} bytes, and the pickle says {nbytes}")
        if bytes_of(storage[:_TAG_BYTES]) != tag(name, nbytes):
            raise MistakenError
        return restore(storages[name], location)

    return _load(file, place, weights_only)


def _load(file: Any, place: Any, weights_only: bool) -> Any:
    try:
        return torch.load(file, map_location=place, weights_only=weights_only, mmap=False)
    except RuntimeError as error:
        if "PytorchStreamReader" in str(error):
            raise CorruptError(f"its pickle asks for what is not there: {str(error).splitlines()[0]}") from error
        raise
