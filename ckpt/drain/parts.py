"""Who delivers what: each node the files of its ranks, and of a file that all nodes have a part of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ckpt import _native
from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.directory.node_place import NodePlace
from ckpt.errors import CorruptError

SLICE_BYTES = 1 << 20  # parts of a common file begin at multiples: a multiple of what direct I/O demands


class Part(NamedTuple):
    """Bytes [begin, end) of a file. `shared`: other nodes deliver the rest."""

    entry: FileEntry
    begin: int
    end: int
    shared: bool

    @property
    def is_last(self) -> bool:
        return self.end == self.entry.bytes


class Delivered(NamedTuple):
    """What a receipt says of a part; `crc32` is that of its bytes."""

    name: str
    begin: int
    end: int
    crc32: int


def is_shared(entry: FileEntry, nodes: int) -> bool:
    """The same on all nodes."""
    return entry.kind == REPLICATED and nodes > 1 and entry.bytes >= nodes * SLICE_BYTES


def parts_of(manifest: Manifest, place: NodePlace) -> list[Part]:
    """What the node of this place delivers."""
    found = []
    for entry in manifest.files:
        if is_shared(entry, place.count):
            found.append(_slice(entry, place.number, place.count))
        elif entry.rank in place.ranks:
            found.append(Part(entry, 0, entry.bytes, shared=False))
    return found


def _slice(entry: FileEntry, node: int, nodes: int) -> Part:
    slices = -(-entry.bytes // SLICE_BYTES)
    begin, end = (min(entry.bytes, slices * edge // nodes * SLICE_BYTES) for edge in (node, node + 1))
    return Part(entry, begin, end, shared=True)


def expect_whole(files: Sequence[FileEntry], delivered: Iterable[Delivered]) -> None:
    """
    Raises:
        CorruptError: a byte of a file was not delivered, or twice, or the parts do not make up its CRC-32.
    """
    by_name: dict[str, list[Delivered]] = {}
    for part in delivered:
        by_name.setdefault(part.name, []).append(part)
    for entry in files:
        _expect_file(entry, sorted(by_name.get(entry.name, []), key=lambda part: (part.begin, part.end)))


def _expect_file(entry: FileEntry, parts: Sequence[Delivered]) -> None:
    end = crc = 0
    for part in parts:
        if part.begin != end:
            raise CorruptError(f"'{entry.name}' was delivered with a gap or an overlap at byte {min(end, part.begin)}")
        crc = _native.crc32_combine(crc, part.crc32, part.end - part.begin)
        end = part.end
    if not parts or end != entry.bytes:
        raise CorruptError(f"'{entry.name}' was delivered up to byte {end} of {entry.bytes}")
    if crc != entry.crc32:
        raise CorruptError(f"'{entry.name}' was delivered with the CRC-32 {crc:08x} where {entry.crc32:08x} was expected")


def owners_of(name: str, delivered: Mapping[int, Iterable[Delivered]]) -> list[int]:
    """The nodes that have delivered something of a file."""
    return [node for node, parts in delivered.items() if any(part.name == name for part in parts)]
