"""A plain loop of direct reads: a limit for the disk where fio is missing."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from bench.measure.sampling import clock

PIECE = 4 << 20


def write_direct(path: Path, nbytes: int) -> None:
    """A durable file to read, of at least one piece; its blocks differ."""
    with path.open("wb") as file:
        for _ in range(max(1, nbytes // PIECE)):
            file.write(os.urandom(mmap.PAGESIZE) * (PIECE // mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class DirectReads:
    """A limit for the disk: threads that read a file's blocks into one aligned buffer each, past the page cache where the file
    system can; the name says whether it can.

    It does nothing that a load must do; it is not fio, and results say so.
    """

    def __init__(self, path: Path, nbytes: int, threads: int, block_bytes: int) -> None:
        self._path, self._threads, self._block = path, threads, block_bytes
        self._blocks = max(1, min(nbytes, path.stat().st_size) // block_bytes)
        self._flags = os.O_RDONLY | (os.O_DIRECT if can_be_direct(path) else 0)
        self.name = f"own loop of reads, {threads} threads, {block_bytes >> 20} MiB"
        if not self._flags & os.O_DIRECT:
            self.name += ", through the page cache"
        self._errors: list[OSError] = []

    def run(self) -> float:
        """Bytes per second.

        Raises:
            OSError: a read failed.
        """
        self._errors.clear()
        descriptor = os.open(self._path, self._flags)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            started = clock()
            threads = [threading.Thread(target=self._read_some, args=(descriptor, i)) for i in range(self._threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            elapsed = clock() - started
        finally:
            os.close(descriptor)
        if self._errors:
            raise self._errors[0]
        return self._blocks * self._block / elapsed

    def _read_some(self, descriptor: int, first: int) -> None:
        with mmap.mmap(-1, self._block) as buffer:
            try:
                for block in range(first, self._blocks, self._threads):
                    if os.preadv(descriptor, [buffer], block * self._block) != self._block:
                        raise OSError("a direct read was short")
            except OSError as error:
                self._errors.append(error)


def can_be_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
