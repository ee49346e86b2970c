"""How the training runs, told to a process that must not slow it down: one page that both map.

    u64 magic   u64 counter   f64 seconds of the last iteration   f64 their median without a drain   u64 capturing
    u64 iterations

The counter is odd while the rest is being written. `capturing` is 1 while a fence or a capture runs. `iterations` counts
those that have ended: what is told twice of one is the same iteration.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

from ckpt.errors import StorageError

_MAGIC = int.from_bytes(b"ckptpace", "little")
_LAYOUT = struct.Struct("<QQddQQ")
_COUNTER = struct.Struct("<Q")
_COUNTER_AT = 8
_PAGE_BYTES = 4096
_MOST_LOOKS = 100  # at a page that is being written each time


class Pace(NamedTuple):
    """
    Attributes:
        counter: another number each time that something was written.
        iteration_s, median_s: 0: not known yet.
    """

    counter: int
    iteration_s: float
    median_s: float
    capturing: bool
    iterations: int


class PaceWriter:
    """Of the process that trains; one thread at a time.

    Raises:
        StorageError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(descriptor, _PAGE_BYTES)
                self._map = mmap.mmap(descriptor, _PAGE_BYTES)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(error.errno or 0, f"cannot make '{path}': {error.strerror}", str(path)) from error
        magic, counter = struct.unpack_from("<QQ", self._map)
        self._counter = (counter + 1) // 2 * 2 if magic == _MAGIC else 0  # goes on where one before has ended

    def write(self, iterations: int, iteration_s: float, median_s: float, capturing: bool) -> None:
        _COUNTER.pack_into(self._map, _COUNTER_AT, self._counter + 1)
        self._counter += 2
        _LAYOUT.pack_into(self._map, 0, _MAGIC, self._counter - 1, iteration_s, median_s, capturing, iterations)
        _COUNTER.pack_into(self._map, _COUNTER_AT, self._counter)

    def close(self) -> None:
        self._map.close()


class PaceReader:
    """Of another process.

    Raises:
        StorageError: there is no such file yet.
    """

    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_size < _PAGE_BYTES:
                    raise StorageError(0, f"'{path}' is no page yet", str(path))
                self._map = mmap.mmap(descriptor, _PAGE_BYTES, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(error.errno or 0, f"cannot map '{path}': {error.strerror}", str(path)) from error

    def read(self) -> Pace | None:
        """None if nothing was written yet, or it never holds still."""
        for _ in range(_MOST_LOOKS):
            magic, counter, iteration_s, median_s, capturing, iterations = _LAYOUT.unpack_from(self._map)
            if magic != _MAGIC:
                return None
            if counter % 2 == 0 and _COUNTER.unpack_from(self._map, _COUNTER_AT)[0] == counter:
                return Pace(counter, iteration_s, median_s, bool(capturing), iterations)
        return None

    def close(self) -> None:
        self._map.close()
