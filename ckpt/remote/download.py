"""Brings bytes of an object here: several ranged requests at a time, handed over in their order. A few chunks are in memory."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ckpt import _native
from ckpt.errors import CorruptError
from ckpt.storage.object_store import ObjectStore

_CHUNK_BYTES = 8 << 20
_IN_FLIGHT = 16

Take = Callable[[int, memoryview], object]  # where a chunk begins, and what is in it


class Expected(NamedTuple):
    """What an object should be, as its manifest says."""

    key: str
    bytes: int
    crc32: int


def download(store: ObjectStore, expected: Expected, take: Take) -> None:
    """All of it.

    Args:
        take: called with one chunk after the other. What it was given is good only if this returns.

    Raises:
        CorruptError: it is not what it should be.
        ObjectStoreError: it cannot be read. Whatever take() raises.
    """
    crc32 = 0
    for begin, chunk in _in_order(store, expected.key, [(0, expected.bytes)]):
        crc32 = _native.crc32(chunk, crc32)
        take(begin, chunk)
    if crc32 != expected.crc32:
        where = f"'{store.url}/{expected.key}'"
        raise CorruptError(f"{where} has the CRC-32 {crc32:08x} where its manifest says {expected.crc32:08x}: it is damaged")


def download_ranges(store: ObjectStore, key: str, ranges: Iterable[tuple[int, int]], take: Take) -> None:
    """Parts of it, (begin, end), which nobody has verified.

    Raises:
        CorruptError: it ends before.
        ObjectStoreError: it cannot be read. Whatever take() raises.
    """
    for begin, chunk in _in_order(store, key, ranges):
        take(begin, chunk)


def _in_order(store: ObjectStore, key: str, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
    parts = ((begin, min(begin + _CHUNK_BYTES, end)) for first, end in ranges for begin in range(first, end, _CHUNK_BYTES))
    waiting: collections.deque[tuple[int, concurrent.futures.Future[memoryview]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_IN_FLIGHT, "ckpt-download") as pool:
        try:
            for begin, end in parts:
                waiting.append((begin, pool.submit(store.read_range, key, begin, end)))
                if len(waiting) == _IN_FLIGHT:
                    at, future = waiting.popleft()
                    yield at, future.result()
            while waiting:
                at, future = waiting.popleft()
                yield at, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
