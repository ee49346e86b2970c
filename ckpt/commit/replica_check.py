"""Whether what was given as replicated is the same on all ranks: the structure and the layout, not the tensors' bytes."""

from __future__ import annotations

import array
import dataclasses
import pickletools
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

_CONTEXT = 3  # values before the difference that a message shows
_LONGEST_VALUE = 40  # characters of each
_CONSTANTS = {"NONE": "None", "NEWTRUE": "True", "NEWFALSE": "False", "EMPTY_DICT": "{", "EMPTY_LIST": "[", "EMPTY_TUPLE": "()"}
# A rank's tensors lie on a device of its own; the file says that of the rank which wrote it.
_DEVICE = re.compile(rb"X....(cuda|xpu|npu|hpu|privateuseone):\d+", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Digest:
    """Of one replicated state on one rank."""

    pickle_crc: int
    pickle_bytes: int
    sizes_crc: int
    records: int
    layout_crc: int


def digest_of(pickle: bytes, sizes: Sequence[int], layout_crc: int) -> Digest:
    """
    Args:
        sizes: of the records, bytes.
        layout_crc: of where they lie in the file; 0 if this rank does not write it.
    """
    plain = without_devices(pickle)
    return Digest(zlib.crc32(plain), len(plain), zlib.crc32(array.array("Q", sizes).tobytes()), len(sizes), layout_crc)


def without_devices(pickle: bytes) -> bytes:
    return _DEVICE.sub(b"X\x06\0\0\0device", pickle)


def without_numbers(pickle: bytes, keys: Iterable[str]) -> bytes:
    """Without the integers that stand under these keys, where a key is used for the first time."""
    for key in map(str.encode, keys):
        head = b"X" + len(key).to_bytes(4, "little") + key
        number = re.compile(re.escape(head) + rb"(?:q.|r....)?(?:K.|M..|J....)", re.DOTALL)
        pickle = number.sub(lambda _, head=head: head, pickle)  # type: ignore[misc]
    return pickle


def first_difference(ours: bytes, theirs: bytes, our_rank: int, their_rank: int) -> str:
    """Where two pickles part, in words: the values just before, then both values."""
    if not ours or not theirs:
        return f"rank {our_rank if not ours else their_rank} gave no replicated state"
    before: list[str] = []
    for mine, other in zip(_values(ours), _values(theirs), strict=False):
        if mine != other:
            where = " after " + ", ".join(before[-_CONTEXT:]) if before else " at the beginning"
            return f"{where.strip()}: {mine} on rank {our_rank}, {other} on rank {their_rank}"
        before.append(mine)
    if ours == theirs:
        return f"in the sizes or the layout of its tensors: what is lazy must be the same on rank {our_rank} and {their_rank}"
    return "only in which objects are shared, in the order of a set (give sorted lists), or in where one of them ends"


def _values(pickle: bytes) -> list[str]:
    """The values in the order in which they stand in the pickle; what has been seen before is not repeated."""
    found = []
    for opcode, value, _ in pickletools.genops(pickle):
        if opcode.name in _CONSTANTS:
            found.append(_CONSTANTS[opcode.name])
        elif value is not None and "PUT" not in opcode.name and "GET" not in opcode.name and opcode.name != "PROTO":
            found.append(_show(value))
    return found


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
