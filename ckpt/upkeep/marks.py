"""Whether two values that a pickle describes are the same, where a few characters of them do not tell."""

from __future__ import annotations

import itertools
import zlib
from typing import Any

from ckpt.upkeep.pickles import Global, Made, Pairs, Stored

_LONGEST_SHOWN = 60  # characters of a text that is shown whole
_LARGEST_SHOWN = 1000  # bits
_DEEPEST = 50
_MOST_VISITS = 100_000  # a small pickle can share containers so that its parts are without number
_unlike = itertools.count(-1, -1)  # of what cannot be looked through: it is like nothing


def mark_of(value: Any) -> int:
    """0 for what is shown as it is, see described.shown()."""
    if isinstance(value, (str, bytes)):
        return 0 if len(value) <= _LONGEST_SHOWN else _mark_of_bytes(value)
    if isinstance(value, int):
        return 0 if value.bit_length() <= _LARGEST_SHOWN else _mark_of_int(value)
    if not isinstance(value, Made):
        return 0
    try:
        return _Looking().mark(value, 0)
    except _TooMuchError:
        return next(_unlike)


class _TooMuchError(Exception):
    """It is nested, or shared, beyond what anybody would look through."""


class _Looking:
    def __init__(self) -> None:
        self._visits = 0

    def mark(self, value: Any, depth: int) -> int:
        self._visits += 1
        if depth > _DEEPEST or self._visits > _MOST_VISITS:
            raise _TooMuchError
        if isinstance(value, Made):
            parts = (value.args, value.items, value.state, value.pairs)
            return self._joined(value.name, [self.mark(each, depth + 1) for each in parts])
        if isinstance(value, Pairs):
            return self._joined("dict", [self.mark(each, depth + 1) for each in value.flat])
        if isinstance(value, Stored):
            return self._joined("stored", [])  # no bytes are compared, and its number is that of one file
        if isinstance(value, Global):
            return self._joined("global", [self.mark(each, depth + 1) for each in value])
        if isinstance(value, (list, tuple)):
            return self._joined(type(value).__name__, [self.mark(each, depth + 1) for each in value])
        if isinstance(value, (str, bytes)):
            return _mark_of_bytes(value)
        return _mark_of_int(value) if type(value) is int else _mark_of_bytes(f"{type(value).__name__} {value!r}")

    @staticmethod
    def _joined(kind: str, parts: list[int]) -> int:
        return _mark_of_bytes(f"{kind} {parts}")


def _mark_of_int(value: int) -> int:
    return _mark_of_bytes(value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True), 1)


def _mark_of_bytes(value: str | bytes, kind: int = 2) -> int:
    """Two CRC-32s, so that what differs hardly ever passes for the same."""
    content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    kind += 2 * isinstance(value, str)
    return zlib.crc32(content, kind) << 64 | zlib.adler32(content) << 32 | len(content) & 0xFFFFFFFF
