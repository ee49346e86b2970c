"""Files by which processes hear of each other: what one in the background has to say, and whether something has changed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ckpt.errors import StorageError
from ckpt.storage import durable

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
