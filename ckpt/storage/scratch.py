"""Files that nobody misses after a crash: nothing here is synced. And how a file is opened that is to be given away."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ckpt.errors import StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import temporary_path

_PRIVATE = 0o600


def replace_private(path: Path, content: bytes) -> None:
    """Gives the small file `path` this content, atomically. Only the user can read it.

    Raises:
        StorageError: it cannot be written.
    """
    with new_file(path) as file:
        file.write(memoryview(content))


class NewFile:
    """Under a temporary name. Only the user can read it."""

    def __init__(self, temporary: Path) -> None:
        self._path = temporary
        self._descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE)

    def write(self, content: memoryview) -> None:
        """Behind what was written last.

        Raises:
            StorageError: it cannot be written.
        """
        with _explained(self._path):
            while content:
                content = content[os.write(self._descriptor, content) :]

    def grow(self, size: int) -> None:
        """To so many bytes, by a hole."""
        with _explained(self._path):
            os.ftruncate(self._descriptor, size)

    def seek(self, offset: int) -> None:
        os.lseek(self._descriptor, offset, os.SEEK_SET)

    def close(self) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """Gets its name at the end of the block; if that raises, it is removed.

    Raises:
        StorageError: it cannot be made.
    """
    temporary = temporary_path(path)
    try:
        with _explained(path):
            file = NewFile(temporary)
        try:
            yield file
        finally:
            file.close()
        with _explained(path):
            os.replace(temporary, path)
    except BaseException:
        durable.remove_quietly(temporary)
        raise


def remove(path: Path) -> None:
    """A file, or a directory with all that is in it, as far as it can be removed; others may remove it, too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        durable.remove_quietly(path)


def make_private_directory(parent: Path | None) -> Path:
    """A new one. Only the user can enter it.

    Args:
        parent: made if it is not there; None: the directory of temporary files.

    Raises:
        StorageError: it cannot be made.
    """
    if parent is not None:
        durable.make_directory(parent, durable=False)
    with _explained(parent or Path(tempfile.gettempdir())):
        return Path(tempfile.mkdtemp(prefix="lazyckpt-", dir=parent))


class OpenFile:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, connection: socket.socket, offset: int, count: int) -> int:
        """From the file to a connection that does not block; returns how many bytes went; 0: the file has become shorter."""
        return os.sendfile(connection.fileno(), self._descriptor, offset, count)


@contextlib.contextmanager
def opened(path: Path, size: int) -> Iterator[OpenFile]:
    """A file that is as long as it should be, and no link to another one.

    Raises:
        StorageError: it is not.
    """
    with _explained(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise StorageError(errno.EINVAL, f"'{path}' is no file of {size} bytes", str(path))
        yield OpenFile(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot use '{path}': {error.strerror}", str(path)) from error
