"""What a rank writes of a sharded state, and what rank 0 must know of it for the metadata."""

from __future__ import annotations

import array
import base64
import hashlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ckpt.sharded.chunks import Box


class Item(NamedTuple):
    """One archive of the file.

    Attributes:
        key: its number among the keys of the state.
        box: None: it holds a value.
    """

    key: int
    box: Box | None


class Key(NamedTuple):
    """As rank 0 notes it.

    Attributes:
        shape: of the whole tensor; None: it is a value.
        properties: torch's own, of this rank's part.
    """

    name: str
    shape: tuple[int, ...] | None
    properties: Any


class Description(NamedTuple):
    """Of the whole state. It is the same on all ranks, but for properties that nobody compares."""

    keys: list[Key]
    paths: dict[str, tuple[Any, ...]]


class Contents(NamedTuple):
    """Of one save on one rank.

    Attributes:
        items: what it writes, in the order of the archives.
        payloads: of each archive the number of its record, if that is the elements of a tensor as they follow each other in a
            contiguous one, and nothing else; -1 if it is not.
        description: on rank 0 alone.
    """

    items: list[Item]
    payloads: list[int]
    description: Description | None


class PlacedItem(NamedTuple):
    """An item, and where it lies in its file."""

    key: int
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...]
    at: int
    length: int


_VALUE = -1


def encode(items: Sequence[Item], places: Sequence[tuple[int, int]]) -> str:
    """For a message.

    Args:
        places: offset and length of each item's archive.
    """
    numbers = array.array("q")
    for (key, box), (at, length) in zip(items, places, strict=True):
        if box is None:
            numbers.extend((key, _VALUE, at, length))
        else:
            numbers.extend((key, len(box.sizes), *box.offsets, *box.sizes, at, length))
    return base64.b85encode(zlib.compress(numbers.tobytes(), 1)).decode()


def decode(text: str) -> list[PlacedItem]:
    """
    Raises:
        ValueError: that is not from encode().
    """
    numbers = array.array("q")
    try:
        numbers.frombytes(zlib.decompress(base64.b85decode(text)))
    except zlib.error as error:
        raise ValueError(f"no layout: {error}") from error
    found: list[PlacedItem] = []
    at = 0
    while at < len(numbers):
        key, dims = numbers[at], numbers[at + 1]
        at += 2
        offsets: tuple[int, ...] | None = None
        sizes: tuple[int, ...] = ()
        if dims != _VALUE:
            offsets, sizes = tuple(numbers[at : at + dims]), tuple(numbers[at + dims : at + 2 * dims])
            at += 2 * dims
        found.append(PlacedItem(key, offsets, sizes, numbers[at], numbers[at + 1]))
        at += 2
    return found


def digest(text: str) -> str:
    """Tells one layout from every other."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
