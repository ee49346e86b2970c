"""A file that is written piece by piece, and has its name only once all of it is durable."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

from ckpt.errors import StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import temporary_path

_ALIGNMENT = 64  # of records, as torch has it
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20  # bytes of a zip's, before name and extra fields; and of the one for large records
# The extra field by which Android's zipalign aligns. That of torch would say that the file is torch's to the last byte.
_ALIGNING = 0xD935
_ALIGNING_HEAD = struct.Struct("<HHH")  # which it is, how long, to what


class StreamedFile:
    """A context manager: what was written gets its name at the end of the block, or goes if that raised.

    Attributes:
        file: to write to, seekable.

    Raises:
        StorageError: it cannot be made, or not be written.
    """

    def __init__(self, path: Path) -> None:
        self._target = durable.file_target(path)
        durable.directory_of_target(self._target)
        self._temporary = temporary_path(self._target)

    def __enter__(self) -> BinaryIO:
        try:
            self.file: BinaryIO = open(self._temporary, "xb", buffering=1 << 20)
        except OSError as error:
            raise self._explained(error) from error
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        try:
            if error is None:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.file.close()
            if error is None:
                durable.rename_durably(self._temporary, self._target)
                return
        except OSError as failure:
            durable.remove_quietly(self._temporary)
            if error is None:
                raise self._explained(failure) from failure
        durable.remove_quietly(self._temporary)
        if isinstance(error, OSError) and not isinstance(error, StorageError) and error.filename is None:
            raise self._explained(error) from error  # a write

    def _explained(self, error: OSError) -> StorageError:
        return StorageError(error.errno or 0, f"cannot write '{self._target}': {error.strerror or error}", str(self._target))


class Within:
    """A file that begins where another one has come to: an archive that is a part of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begin = file.tell()

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._begin

    def seek(self, offset: int) -> int:
        return self._file.seek(self._begin + offset) - self._begin

    def write(self, content: bytes | memoryview) -> int:
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def begin_entry(archive: zipfile.ZipFile, file: BinaryIO | Within, name: str, size: int) -> IO[bytes]:
    """A record of a torch file that is being written: a context manager, to write `size` bytes to.

    They begin at a multiple of the alignment, so that torch may map them.
    """
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = size
    big = size > zipfile.ZIP64_LIMIT // 2
    begin = file.tell() + _LOCAL_HEADER + len(info.filename) + (_ZIP64_EXTRA if big else 0) + _ALIGNING_HEAD.size
    padding = -begin % _ALIGNMENT
    info.extra = _ALIGNING_HEAD.pack(_ALIGNING, 2 + padding, _ALIGNMENT) + bytes(padding)
    return archive.open(info, "w", force_zip64=big)
