"""Tries out what a directory can do: on a temporary file of its own, which goes at the end."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from pathlib import Path
from typing import NamedTuple

from ckpt.errors import StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import temporary_path

_PIECE_BYTES = 4 << 20


class Trial(NamedTuple):
    """
    Attributes:
        locks, direct, renames: whether it has locks, takes direct I/O, and lets a file be renamed and its directory be synced.
        rate: bytes a second that were written and flushed, by one thread; 0: it was not tried.
        why: what was refused, in words.
    """

    locks: bool
    direct: bool
    renames: bool
    rate: float
    why: str


def try_out(directory: Path, size: int) -> Trial:
    """
    Args:
        size: how many bytes to write, at most a few hundred MiB.

    Raises:
        StorageError: nothing can be made there.
    """
    path = temporary_path(directory / "trial")
    other = temporary_path(directory / "trial")
    why = ""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot write to '{directory}': {error.strerror}", str(path)) from error
    try:
        locks, direct, rate = _locks(descriptor), _takes_direct(path), _rate(descriptor, size)
        try:
            durable.rename_durably(path, other)
            renames = True
        except StorageError as error:
            renames, why = False, str(error)
        return Trial(locks, direct, renames, rate, why)
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot write to '{directory}': {error.strerror}", str(path)) from error
    finally:
        os.close(descriptor)
        durable.remove_quietly(path)
        durable.remove_quietly(other)


def _locks(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _takes_direct(path: Path) -> bool:
    """Opening alone says little: some file systems refuse the first write."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as page:
                return os.pwrite(descriptor, page, 0) == mmap.PAGESIZE
        finally:
            os.close(descriptor)
    return False


def _rate(descriptor: int, size: int) -> float:
    piece = memoryview(os.urandom(_PIECE_BYTES))
    began = time.monotonic()
    done = 0
    while done < size:
        done += os.pwrite(descriptor, piece[: size - done], done)
    os.fdatasync(descriptor)
    return done / max(time.monotonic() - began, 1e-9) if done else 0.0
