"""Where one rank finds the files of a checkpoint. Of each file the nearest place that has it: its node, another node, home.

A file that turns out to be damaged is read from the next place that has it: pass_over(). Nothing else is affected by that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import NAMED_BY_OTHERS, FileEntry, Manifest
from ckpt.directory.root import has_size
from ckpt.errors import CorruptError, StorageError
from ckpt.metrics.noting import tier_of
from ckpt.restore.fetching import NodeFetch

logger = logging.getLogger("ckpt")

Ranges = Sequence[tuple[int, int]]  # (begin, end), ascending
Result = TypeVar("Result")
NODE, HOME = "node", "home"


class DirectoryPlace:
    """A step directory.

    Args:
        label: what it is called.
        finished: whether it has the manifest.
    """

    def __init__(self, directory: Path, label: str, *, finished: bool = True) -> None:
        self.directory = directory
        self.finished = finished
        self._label = label
        self._names: dict[tuple[str, int, int, int], str] | None = None

    def manifest(self) -> Manifest | None:
        found = manifests.read_if_any(self.directory)
        files = () if found is None else found.files
        self._names = {_content(file): file.name for file in files if file.kind not in NAMED_BY_OTHERS}
        return found

    def find(self, entry: FileEntry, ranges: Ranges | None) -> tuple[Path, str] | None:
        path = self.directory / self._name_of(entry)
        return (path, self._label) if has_size(path, entry.bytes) else None

    def _name_of(self, entry: FileEntry) -> str:
        """Here; at home it may be another one than on the nodes. What other files name has the same everywhere."""
        if self._names is None:
            self.manifest()
        return (self._names or {}).get(_content(entry), entry.name)

    def give_up(self, entry: FileEntry, path: Path) -> bool:
        """`path` is damaged; whether this place may have another one."""
        return False


class FetchedPlace:
    """Other nodes."""

    def __init__(self, fetch: NodeFetch) -> None:
        self._fetch = fetch

    def manifest(self) -> Manifest | None:
        return self._fetch.manifest()

    def find(self, entry: FileEntry, ranges: Ranges | None) -> tuple[Path, str] | None:
        return self._fetch.whole(entry) if ranges is None else self._fetch.ranges(entry, ranges)

    def give_up(self, entry: FileEntry, path: Path) -> bool:
        """See DirectoryPlace."""
        self._fetch.dismiss(entry, path)
        return path.name != entry.name  # of a whole file the bytes were compared when they came


class Place(Protocol):
    """Where files of one checkpoint may lie."""

    def manifest(self) -> Manifest | None:
        """None: it has none."""

    def find(self, entry: FileEntry, ranges: Ranges | None) -> tuple[Path, str] | None:
        """A local path, and what it was read from; None: it has not got it.

        Args:
            ranges: (begin, end) of the bytes that are wanted; None: all.
        """

    def give_up(self, entry: FileEntry, path: Path) -> bool:
        """See DirectoryPlace."""


class StepPlaces:
    """
    Args:
        places: nearest first.
        nearest: the directory that messages name.

    Attributes:
        sources: what each file was read from, by its name: "node", "node 3", "home", "object store".
    """

    def __init__(self, places: Sequence[Place], nearest: Path) -> None:
        self.nearest = nearest
        self.sources: dict[str, str] = {}
        self._places = places
        self._entries: dict[str, FileEntry] = {}
        self._ranges: dict[str, Ranges] = {}
        self._chosen: dict[str, tuple[int, Path]] = {}
        self._given_up: set[tuple[int, str]] = set()
        self.failures: list[tuple[str, str, str]] = []  # see RestoreFigures
        self.damage: list[tuple[str, Exception]] = []  # names of files that were found damaged, wherever

    @classmethod
    def at(cls, directory: Path) -> StepPlaces:
        """Of a directory alone."""
        return cls([DirectoryPlace(directory, HOME)], directory)

    def __str__(self) -> str:
        return str(self.nearest)

    def read_manifest(self, sequence: int, identity: str = "") -> Manifest:
        """Of the commit that rank 0 has named, from the nearest place that has it.

        Args:
            identity: see manifests.identity(); empty: whatever has the sequence.

        Raises:
            CorruptError: it is damaged, or another checkpoint is there.
            NotACheckpointError, StorageError: there is none, or it cannot be read.
        """
        found = None
        for place in self._places:
            manifest = place.manifest()
            if manifest is not None and _is(manifest, sequence, identity):
                found = manifest
                break
        if found is None:
            found = manifests.read(self.nearest)
            if not _is(found, sequence, identity):
                raise CorruptError(
                    f"'{self.nearest}' is another checkpoint than on rank 0: all ranks must see the same directory"
                )
        self._entries = {file.name: file for file in found.files}
        return found

    @property
    def files(self) -> Sequence[FileEntry]:
        """Of the manifest that was read."""
        return [*self._entries.values()]

    @property
    def lone_directory(self) -> Path | None:
        """Where all of it lies, if it lies nowhere else."""
        only = self._places[0] if len(self._places) == 1 else None
        return only.directory if isinstance(only, DirectoryPlace) and only.finished else None

    def path_of(self, name: str) -> Path:
        """The nearest that has a file of this name. If none has: where it should be, so that errors name that."""
        if name not in self._chosen and not self._choose(name):
            return self.nearest / name
        return self._chosen[name][1]

    def limit(self, name: str, ranges: Ranges) -> None:
        """From now on only these bytes of a file are wanted; elsewhere there may be anything in what path_of() gives."""
        self._ranges[name] = ranges

    def pass_over(self, name: str, error: Exception) -> bool:
        """What path_of() has given is damaged, or cannot be read. False: no other place has it.

        Args:
            error: says so.
        """
        self.damage.append((name, error))
        if name not in self._chosen:
            return False
        number, path = self._chosen.pop(name)
        before = self.sources.get(name)
        if isinstance(error, CorruptError):
            self.failures.append((tier_of(before or HOME), name, str(error)))
        if not self._places[number].give_up(self._entries[name], path):
            self._given_up.add((number, name))
        if not self._choose(name):
            return False
        logger.warning("'%s' is read from %s instead of %s: %s", name, self.sources[name], before, error)
        return True

    def read(self, name: str, attempt: Callable[[Path], Result]) -> Result:
        """What `attempt` makes of the file, from the nearest place where that is good.

        Raises:
            CorruptError, StorageError: as it has raised at the last of them. Anything else that it raises.
        """
        while True:
            try:
                return attempt(self.path_of(name))
            except (CorruptError, StorageError) as error:
                if not self.pass_over(name, error):
                    raise

    def read_bytes(self) -> dict[str, int]:
        """What this rank has wanted of it, by the tier from which it came."""
        found: dict[str, int] = {}
        for name in self._chosen:
            ranges, tier = self._ranges.get(name), tier_of(self.sources[name])
            size = self._entries[name].bytes if ranges is None else sum(end - begin for begin, end in ranges)
            found[tier] = found.get(tier, 0) + size
        return found

    def _choose(self, name: str) -> bool:
        entry = self._entries.get(name)
        if entry is None:
            return False
        for number, place in enumerate(self._places):
            if (number, name) in self._given_up:
                continue
            found = place.find(entry, self._ranges.get(name))
            if found is not None:
                self._chosen[name] = number, found[0]
                self.sources[name] = found[1]
                return True
        return False

    def hold(self, sequence: int) -> bool:
        """Whether that commit still lies wherever this rank has looked for it."""
        directories = [place for place in self._places if isinstance(place, DirectoryPlace) and place.finished]
        return all(manifests.is_at(each.directory, sequence) for each in directories)


def _is(manifest: Manifest, sequence: int, identity: str) -> bool:
    return manifest.sequence == sequence and identity in ("", manifests.identity(manifest))


def same_content(manifest: Manifest, entry: FileEntry) -> str:
    """What the file of another manifest of this commit is called in this one. What other files name is called the same."""
    if entry.kind in NAMED_BY_OTHERS:
        return entry.name
    return next((file.name for file in manifest.files if _content(file) == _content(entry)), entry.name)


def _content(entry: FileEntry) -> tuple[str, int, int, int]:
    return entry.kind, entry.rank, entry.bytes, entry.crc32
