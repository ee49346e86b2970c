"""What a restore has found damaged in checkpoints that it passed over: older ones may have the same blocks.

Saves share what has not changed (csrc/jobs/reuse.cc), so one bad sector may be in the files of many checkpoints. Of each
candidate that comes after a damaged one, each rank first reads what it knows to be damaged, at the same place of the same file,
and no more: a record or a piece of one file, instead of all bytes of all files. What that finds is proven by a checksum of the
candidate itself; if it finds nothing, the candidate is read as a whole as ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ckpt import _native
from ckpt.directory import manifest as manifests
from ckpt.directory.damage import Role, roles_of
from ckpt.directory.manifest import SHARDED, FileEntry
from ckpt.errors import CorruptError, StorageError
from ckpt.loading.archive import Archive, reader_threads
from ckpt.restore.candidates import Objection
from ckpt.restore.file_readers import UNFIT
from ckpt.restore.places import StepPlaces
from ckpt.restore.verified_file import VerifiedFile

_MOST = 64  # places that are looked at in each candidate


class _Place(NamedTuple):
    """Bytes begin..end of a file, some of which are wrong. `unreadable`: the disk does not give them."""

    role: Role
    begin: int
    end: int
    unreadable: bool


class KnownDamage:
    """Of one rank, in one restore."""

    def __init__(self) -> None:
        self._places: list[_Place] = []

    def note(self, files: Iterable[FileEntry], failures: Iterable[tuple[str, Exception]]) -> None:
        """
        Args:
            files: of the checkpoint.
            failures: names of those that are damaged, and the errors that say so.
        """
        roles = {file.name: role for role, file in roles_of(files).items()}
        for name, error in failures:
            if not isinstance(error, (CorruptError, StorageError)) or error.bytes_at is None or name not in roles:
                continue
            place = _Place(roles[name], *error.bytes_at, isinstance(error, StorageError))
            if place not in self._places and len(self._places) < _MOST:
                self._places.append(place)

    def look_for(self, directory: Path, files: Iterable[FileEntry], timeout_s: float) -> None:
        """Whether a checkpoint has the same damage.

        Raises:
            CorruptError, StorageError: it has.
            DeadlineError: to read that little took longer than `timeout_s`, seconds.
        """
        roles = roles_of(files)
        for place in self._places:
            file = roles.get(place.role)
            if file is not None and place.end <= file.bytes:
                _look_at(directory / file.name, file, place, timeout_s)


def same_damage(damage: KnownDamage, places: StepPlaces, sequence: int, timeout_s: float) -> Objection | None:
    """Of a candidate whose files lie in one place. Of others, what is damaged in one place may be good in the next."""
    directory = places.lone_directory
    manifest = None if directory is None else manifests.read_if_any(directory)
    if directory is None or manifest is None or manifest.sequence != sequence:
        return None  # to read it as a whole tells what has become of it
    try:
        damage.look_for(directory, manifest.files, timeout_s)
    except UNFIT as error:
        return Objection(str(error), not manifests.is_at(directory, sequence))
    except Exception:
        return None
    return None


def _look_at(path: Path, file: FileEntry, place: _Place, timeout_s: float) -> None:
    if place.unreadable:
        ranges = [(place.begin, place.end - place.begin, 0, -1)]
        _native.RangeFile(os.fsencode(path), True).read(ranges, threads=reader_threads(), timeout_s=timeout_s, keep=None)
    elif file.kind == SHARDED:
        try:
            with VerifiedFile(path) as verified:
                verified.seek(place.begin)
                verified.read(place.end - place.begin)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
    else:
        try:
            archive = Archive(path, timeout_s)
        except CorruptError:  # it may be no such file: to read it as a whole tells
            return
        try:
            archive.check_at(place.begin, place.end)
        finally:
            archive.close()
