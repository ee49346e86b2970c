"""A file of bytes that are verified before anybody gets them: a data file of a checkpoint, with its checksums beside it."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from pathlib import Path

from ckpt import _native
from ckpt.directory.sharded_files import PieceChecksums, checksums_path
from ckpt.errors import CorruptError

_KEPT_PIECES = 4  # of which a part was read: the next read may be beside it


class VerifiedFile(io.RawIOBase):
    """Once a read has failed, each later one raises the same error, at once: torch's reader calls read() while the error of
    readinto() is still set, and with Python 3.13 the next builtin that is called makes a SystemError of it.

    Raises:
        CorruptError: there are no checksums, or they are those of another file; or, from reads, a piece has changed.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file: io.FileIO | None = None
        self._at = 0
        self._pieces: OrderedDict[int, bytes] = OrderedDict()
        self._failure: CorruptError | OSError | None = None
        beside = checksums_path(path)
        try:
            self._checksums = PieceChecksums.parse(beside.read_bytes())
        except FileNotFoundError as error:
            raise CorruptError(f"'{beside}' is gone: '{path}' cannot be verified") from error
        except CorruptError as error:
            raise CorruptError(f"'{beside}': {error}") from None
        self._file = path.open("rb", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        if size != self._checksums.file_bytes:
            self.close()
            raise CorruptError(f"'{path}' has {size} bytes; its checksums are of {self._checksums.file_bytes}")

    def close(self) -> None:
        file, self._file, self._failure = self._file, None, None  # its traceback knows this file
        if file is not None:
            file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._checksums.file_bytes}[whence]
        if base + offset < 0:
            raise OSError(22, f"negative seek in '{self._path}'")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Fills all of it, but at the end of the file."""
        if self._failure is not None:
            raise self._failure
        try:
            return self._fill(buffer)
        except (CorruptError, OSError) as error:
            self._failure = error
            raise

    def _fill(self, buffer: bytearray | memoryview) -> int:
        wanted = memoryview(buffer).cast("B")
        wanted = wanted[: max(0, self._checksums.file_bytes - self._at)]
        size, done = self._checksums.piece_bytes, 0
        while done < len(wanted):
            number, inside = divmod(self._at, size)
            whole = (len(wanted) - done) // size * size if inside == 0 else 0
            if whole:
                part = wanted[done : done + whole]
                self._read_pieces(number, part)  # without a copy
            else:
                length = min(size, self._checksums.file_bytes - number * size)
                part = wanted[done : done + length - inside]
                part[:] = memoryview(self._piece(number, length))[inside : inside + len(part)]
            done += len(part)
            self._at += len(part)
        return done

    def _piece(self, number: int, length: int) -> bytes:
        found = self._pieces.get(number)
        if found is None:
            content = bytearray(length)
            self._read_pieces(number, memoryview(content))
            found = self._pieces[number] = bytes(content)
            while len(self._pieces) > _KEPT_PIECES:
                self._pieces.popitem(last=False)
        self._pieces.move_to_end(number)
        return found

    def _read_pieces(self, first: int, into: memoryview) -> None:
        """As many as fit; the last one of the file may be shorter."""
        if self._file is None:
            raise ValueError(f"'{self._path}' is closed")
        size = self._checksums.piece_bytes
        begin, done = first * size, 0
        while done < len(into):
            count = os.preadv(self._file.fileno(), [into[done:]], begin + done)
            if count == 0:
                raise CorruptError(f"'{self._path}' ends at byte {begin + done}: it was cut off")
            done += count
        for number, at in enumerate(range(0, len(into), size), first):
            piece = into[at : at + size]
            if _native.crc32(piece) != self._checksums.crc32s[number]:
                where = f"{number * size} to {number * size + len(piece) - 1}"
                raise CorruptError(f"'{self._path}' fails a CRC-32: some of its bytes {where} have changed")
