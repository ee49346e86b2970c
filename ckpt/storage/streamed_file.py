"""A file that is written piece by piece, and has its name only once all of it is durable."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ckpt.errors import StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import temporary_path


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
