"""Files by which processes hear of each other: what one in the background has to say, and whether something has changed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from ckpt.errors import StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import temporary_path

_TAIL_BYTES = 4096


def open_log(path: Path, most_bytes: int) -> int:
    """A descriptor that appends. What is there is dropped first if it has more than so many bytes.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        if os.fstat(descriptor).st_size > most_bytes:
            os.ftruncate(descriptor, 0)
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot open '{path}': {error.strerror}", str(path)) from error
    return descriptor


def append_line(path: Path, line: bytes, most_bytes: int | None, older: Path) -> None:
    """One more line, by one write, so that lines of several processes do not mix. Not durable before the kernel makes it so.

    Args:
        line: without its end.
        most_bytes: a file that has more is renamed to `older` before, in the place of what is there; None: somebody else of
            those who write here does that.

    Raises:
        StorageError: nothing was written, or a part; the next line begins behind that all the same.
    """
    try:
        descriptor, size = _open_to_append(path)
        try:
            if most_bytes is not None and size > most_bytes:
                os.rename(path, older)
                os.close(descriptor)
                descriptor = -1
                descriptor, size = _open_to_append(path)
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            content = b"\n" * torn + line + b"\n"
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot write to '{path}': {error.strerror}", str(path)) from error


def replace_unsynced(path: Path, content: bytes) -> None:
    """Whoever reads it finds it whole. Nothing is made durable: after a crash of the system it may be empty.

    Raises:
        StorageError: it was not replaced.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        durable.remove_quietly(temporary)
        raise StorageError(error.errno or 0, f"cannot write '{path}': {error.strerror}", str(path)) from error


def _open_to_append(path: Path) -> tuple[int, int]:
    """(descriptor, bytes that are there.) A FIFO, which would let this wait for a reader, is none."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return descriptor, found.st_size


def last_line(path: Path) -> str:
    """Empty if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def touch(path: Path) -> None:
    """Makes it if need be. Nothing depends on it: whoever looks at its time looks from time to time anyway."""
    with contextlib.suppress(OSError):
        try:
            os.utime(path)
        except FileNotFoundError:
            durable.make_empty_file(path)


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Another one once the file has been replaced or written to; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
