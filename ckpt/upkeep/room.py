"""How much of the disk checkpoints take, and what removing some of them would give back.

Checkpoints may share blocks (`Options.reuse`), or whole files that have several names: then sizes of files say little. What
belongs to whom is asked of the file system, by addresses on the device (ckpt/storage/extents.py) and by numbers of inodes. What
shares with something elsewhere, as with a copy that `cp --reflink` has made, is given back by no removal here.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ckpt.directory import late_names
from ckpt.storage.extents import extents_of
from ckpt.storage.mounts import mount_of
from ckpt.upkeep.rows import Row

_MOST_OF = 0.99  # of its size: who gives back more shares nothing that matters
_SHARING = ("xfs", "btrfs", "bcachefs", "ocfs2")  # file systems whose files may share blocks


class _Edge(NamedTuple):
    """Where blocks of a file begin or end. `opens`: 1 or -1."""

    at: int
    opens: int
    inode: int
    is_shared: bool


class Room:
    """
    Args:
        places: the directory of each checkpoint, by its name.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._owners: dict[tuple[int, int], set[str]] = {}  # names of checkpoints, by device and inode
        self._elsewhere: set[tuple[int, int]] = set()  # inodes that have names elsewhere, too
        self._taken: collections.Counter[tuple[frozenset[str], bool]] = collections.Counter()  # bytes, by who has them
        paths = self._look(places)
        by_device: dict[int, list[_Edge]] = {}
        may_share: dict[int, bool] = {}
        for (device, inode), (path, size) in paths.items():
            if device not in may_share:
                may_share[device] = _may_share(path.parent)
            edges = _edges_of(path, inode) if may_share[device] else None
            if edges is None:
                self._taken[self._whose(device, {inode}), (device, inode) in self._elsewhere] += size
            else:
                by_device.setdefault(device, []).extend(edges)
        for device, edges in by_device.items():
            self._count(device, sorted(edges))

    def _look(self, places: Mapping[str, Path]) -> dict[tuple[int, int], tuple[Path, int]]:
        """One path of each inode, and the bytes that it takes."""
        found: dict[tuple[int, int], tuple[Path, int]] = {}
        names: collections.Counter[tuple[int, int]] = collections.Counter()
        links = {}
        for name, directory in places.items():
            for path, status in _files_below(directory):
                key = status.st_dev, status.st_ino
                found[key] = path, status.st_size  # blocks are what some file systems tell late, or never
                names[key] += 1
                links[key] = status.st_nlink
                self._owners.setdefault(key, set()).add(name)
        self._elsewhere = {key for key, count in names.items() if links[key] > count}
        return found

    def _whose(self, device: int, inodes: Iterable[int]) -> frozenset[str]:
        return frozenset().union(*(self._owners[device, inode] for inode in inodes))

    def _count(self, device: int, edges: list[_Edge]) -> None:
        """Goes along the device, and sees which files have each stretch of it."""
        there: collections.Counter[int] = collections.Counter()  # inodes
        shared, before = 0, 0
        for edge in edges:
            if there and edge.at > before:
                outside = (shared > 0 and len(there) == 1) or any((device, inode) in self._elsewhere for inode in there)
                self._taken[self._whose(device, there), outside] += edge.at - before
            before = edge.at
            shared += edge.opens * edge.is_shared
            there[edge.inode] += edge.opens
            if not there[edge.inode]:
                del there[edge.inode]

    @property
    def taken(self) -> int:
        """Bytes of the disk, of all of them together."""
        return sum(self._taken.values())

    def freed_by(self, going: Collection[str]) -> int:
        """Bytes that removing these would give back, all together; about, where something else shares with several of them."""
        gone = set(going)
        return sum(size for (owners, outside), size in self._taken.items() if owners <= gone and not outside)

    def freed_by_each(self) -> Mapping[str, int]:
        """By name: what removing one alone would give back. None is not in it."""
        found: collections.Counter[str] = collections.Counter()
        for (owners, outside), size in self._taken.items():
            if len(owners) == 1 and not outside:
                found[next(iter(owners))] += size
        return found


def _edges_of(path: Path, inode: int) -> list[_Edge] | None:
    """None: where it lies cannot be told."""
    try:
        extents = extents_of(path)
    except OSError:
        return None
    if extents is None or any(each.at is None for each in extents):
        return None
    edges = []
    for begin, end, at, is_shared in extents:
        assert at is not None
        edges += [_Edge(at, 1, inode, is_shared), _Edge(at + end - begin, -1, inode, is_shared)]
    return edges


def _may_share(directory: Path) -> bool:
    mount = mount_of(directory)
    return mount is not None and mount.kind in _SHARING


def _files_below(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """What goes meanwhile is passed over, and so are links."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    yield from _files_below(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    yield Path(entry.path), status
    except OSError:
        return


def shares_much(frees: int, size: int) -> bool:
    """Whether removing what has this size gives back so much less that it is worth saying."""
    return frees < size * _MOST_OF


def room_of(directory: Path, names: Iterable[str]) -> Room:
    """Of checkpoints in a directory, by the names that census.look() gives; it may be one itself."""
    places = {}
    for name in names:
        tries = directory / name, late_names.partial_of(directory, name)
        places[name] = next((path for path in tries if os.path.lexists(path)), directory)
    return Room(places)


def with_frees(rows: list[Row], directory: Path) -> list[Row]:
    """What census.look() has found, with what removing each would give back."""
    freed = room_of(directory, [row.name for row in rows]).freed_by_each()
    return [dataclasses.replace(row, frees=min(row.bytes, freed.get(row.name, 0))) for row in rows]
