"""Tries out what a directory can do: on a temporary file of its own, which goes at the end."""

from __future__ import annotations

import concurrent.futures
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

PIECE_BYTES = 4 << 20  # these two as a save has them, unless it is told otherwise
THREADS = 4
_ALIGNMENTS = sorted({512, 1024, 2048, 4096, mmap.PAGESIZE})


class Trial(NamedTuple):
    """
    Attributes:
        locks, direct, renames: whether it has locks, takes direct I/O, and lets a file be renamed and its directory be synced.
        rate: bytes a second that were written, by THREADS threads and past the page cache if it takes that, and flushed; 0: it
            was not tried.
        why: what was refused, in words.
        align: of direct I/O: addresses, lengths and offsets are multiples of it, bytes; 0: there is none.
    """

    locks: bool
    direct: bool
    renames: bool
    rate: float
    why: str
    align: int = 0


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
        locks, align = _locks(descriptor), _direct_alignment(path)
        rate = _rate(path, size, align > 0)
        try:
            durable.rename_durably(path, other)
            renames = True
        except StorageError as error:
            renames, why = False, str(error)
        return Trial(locks, align > 0, renames, rate, why, align)
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


def _direct_alignment(path: Path) -> int:
    """0: it takes none. Opening alone says little: some file systems refuse the first write."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            return next((align for align in _ALIGNMENTS if _takes(descriptor, align)), 0)
        finally:
            os.close(descriptor)
    return 0


def _takes(descriptor: int, align: int) -> bool:
    with (
        contextlib.suppress(OSError),
        mmap.mmap(-1, 2 * align) as memory,
        memoryview(memory) as view,
        view[align:] as block,
    ):
        return os.pwrite(descriptor, block, align) == align
    return False


def _rate(path: Path, size: int, direct: bool) -> float:
    size = size // mmap.PAGESIZE * mmap.PAGESIZE
    if not size:
        return 0.0
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        with mmap.mmap(-1, PIECE_BYTES) as memory:  # begins at a page, as direct I/O wants it
            memory.write(os.urandom(PIECE_BYTES))
            began = time.monotonic()
            with contextlib.suppress(OSError):  # a file system that cannot
                os.posix_fallocate(descriptor, 0, size)
            _write(descriptor, memory, size)
            os.fdatasync(descriptor)
            return size / max(time.monotonic() - began, 1e-9)
    finally:
        os.close(descriptor)


def _write(descriptor: int, memory: mmap.mmap, size: int) -> None:
    def write(begin: int) -> None:
        done, end = begin, min(begin + PIECE_BYTES, size)
        while done < end:
            with memoryview(memory) as view, view[done - begin : end - begin] as piece:
                done += os.pwrite(descriptor, piece, done)

    with concurrent.futures.ThreadPoolExecutor(THREADS, "ckpt-trial") as pool:
        for future in [pool.submit(write, begin) for begin in range(0, size, PIECE_BYTES)]:
            future.result()
