"""A plain loop of direct writes: a limit for the disk where fio is missing."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from bench.measure.sampling import clock

PAGE = mmap.PAGESIZE


class DirectLoop:
    """A limit for the disk: threads that write one aligned buffer again and again, past the page cache.

    It does nothing that a checkpoint must do; it is not fio, and results say so.
    """

    def __init__(self, path: Path, nbytes: int, threads: int, block_bytes: int) -> None:
        self.name = f"own direct-write loop, {threads} threads, {block_bytes >> 20} MiB"
        self._path, self._threads = path, threads
        self._block = block_bytes
        self._blocks = max(1, nbytes // block_bytes)
        self.nbytes = self._blocks * block_bytes
        self._errors: list[OSError] = []

    def run(self) -> float:
        """Bytes per second of a new file, preallocated before the clock starts (as fio does), to the end of fdatasync.

        Raises:
            OSError: no direct I/O here, or a write failed.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT
        descriptor = os.open(self._path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self.nbytes)
            started = clock()
            self._write_all(descriptor)
            os.fdatasync(descriptor)
            return self.nbytes / (clock() - started)
        finally:
            os.close(descriptor)
            self._path.unlink()

    def _write_all(self, descriptor: int) -> None:
        threads = [threading.Thread(target=self._write_some, args=(descriptor, i)) for i in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _write_some(self, descriptor: int, first: int) -> None:
        with mmap.mmap(-1, self._block) as buffer:
            buffer[:PAGE] = os.urandom(PAGE)
            buffer[PAGE:] = buffer[:PAGE] * (self._block // PAGE - 1)
            try:
                for block in range(first, self._blocks, self._threads):
                    if os.pwrite(descriptor, buffer, block * self._block) != self._block:
                        raise OSError("a direct write was short")
            except OSError as error:
                self._errors.append(error)
