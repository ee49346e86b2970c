"""The account that rank 0 keeps of what may be deleted."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

MOST_UNREAD = 1024  # broadcasts that are kept for ranks that have not read them
MOST_LATE = 64  # failed gathers whose late answers are still expected
OPENING = ".open/"  # keys of our own


class Spent(NamedTuple):
    """Keys that nobody will ask for again."""

    words: list[str]  # of broadcasts
    boxes: list[str]  # of gathers that had failed


class KeyCleanup:
    """Rank 0's account of what may still be read or may still arrive. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unread: dict[str, str] = {}  # guarded by _lock, as the next: key of a broadcast to its stream, oldest first
        self._late: dict[str, set[int]] = {}  # key of a failed gather to the ranks whose answers may still come

    def spoke(self, key: str) -> list[str]:
        """Rank 0 broadcasts `key`. Returns keys of broadcasts that are not kept any longer."""
        with self._lock:
            self._unread[key] = stream_of(key)
            return [self._drop_oldest(self._unread)] if len(self._unread) > MOST_UNREAD else []

    def heard(self, key: str, missing: Iterable[int]) -> Spent:
        """Rank 0 has gathered `key`, but for the missing ranks."""
        stream, absent = stream_of(key), set(missing)
        with self._lock:
            boxes = []
            for late in [late for late in self._late if stream_of(late) == stream]:
                self._late[late] &= absent
                if not self._late[late]:
                    del self._late[late]
                    boxes.append(late)
            if absent:
                self._late[key] = absent
                if len(self._late) > MOST_LATE:
                    boxes.append(self._drop_oldest(self._late))
                return Spent([], boxes)
            read = (stream, stream_of(OPENING))
            words = [word for word, its_stream in self._unread.items() if its_stream in read]
            for word in words:
                del self._unread[word]
            return Spent(words, boxes)

    def is_late(self, key: str) -> bool:
        """Whether the gather of this key has failed before."""
        with self._lock:
            return key in self._late

    def close(self) -> Spent:
        """Everything that is left."""
        with self._lock:
            spent = Spent([*self._unread], [*self._late])
            self._unread.clear()
            self._late.clear()
            return spent

    @property
    def all_read(self) -> bool:
        with self._lock:
            return not self._unread

    @staticmethod
    def _drop_oldest(keys: dict[str, str] | dict[str, set[int]]) -> str:
        oldest = next(iter(keys))
        del keys[oldest]
        return oldest


def stream_of(key: str) -> str:
    return key.partition("/")[0]
