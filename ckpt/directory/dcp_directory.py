"""A directory that its user names for a checkpoint of torch.distributed.checkpoint, and that may be saved to again.

    .metadata             what lies where. Readers go by it alone: when it gets its name, its files are the checkpoint
    __0_0.distcp  ...     what each rank has written; each save takes names that no file there has
    __0_0.crc32   ...     see sharded_files.py
    manifest.json         sizes and CRC-32s of all these, for those who copy them
    .lock                 held while a job saves to it

`.metadata` carries its own checksum, behind the end of its pickle, where readers of torch do not look. By that it is known to
be ours: torch itself may have saved there since, and have left manifest and checksums as they were.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import struct
import threading
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path

from ckpt import _native
from ckpt.directory import manifest as manifests
from ckpt.directory import sharded_files
from ckpt.directory.manifest import SHARDED_METADATA, Manifest
from ckpt.directory.root import has_size
from ckpt.directory.sharded_files import METADATA
from ckpt.directory.step_names import names_in
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError, StorageError
from ckpt.storage import durable, temporary_names
from ckpt.storage.directory_lock import DirectoryLock

logger = logging.getLogger("ckpt")

DATA_FILE = re.compile(r"__(?P<rank>\d+)(_frozen)?_(?P<number>\d+)\.(distcp|crc32)")
_SEAL = struct.Struct("<8sI")  # magic, CRC-32 of all before it
_SEALED = b"ckptseal"
_UNSYNCABLE = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS)  # of directories that we cannot have made anything in
_MOST_KNOWN = 1024


class _Users:
    """Of one directory in this process: several saves to it may be under way, by different ways.

    Attributes:
        guard: held, while disks are waited for, by who makes a checkpoint of what is there, or removes some of it.
    """

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self._numbers = threading.Lock()
        self._last: dict[int, int] = {}  # of data files, by rank; guarded by _numbers

    def take_number(self, rank: int, taken: Collection[int]) -> int:
        """One that is not taken, and was not given to another save."""
        with self._numbers:
            self._last[rank] = max([self._last.get(rank, -1), *taken]) + 1
            return self._last[rank]


_users: weakref.WeakValueDictionary[str, _Users] = weakref.WeakValueDictionary()  # by path
_users_guard = threading.Lock()


def _users_of(path: Path) -> _Users:
    with _users_guard:
        name = os.path.realpath(path)
        found = _users.get(name)
        if found is None:
            found = _users[name] = _Users()
        return found


def _forget_users() -> None:
    """Of the parent process."""
    global _users_guard
    _users_guard = threading.Lock()
    _users.clear()


os.register_at_fork(after_in_child=_forget_users)


class DcpDirectory:
    """Of one process. It need not be there before claim(), or before the first file is made.

    Args:
        locks: whether this process is the one that locks it: rank 0.
    """

    def __init__(self, path: Path, *, locks: bool) -> None:
        self.path = path
        self._lock = DirectoryLock(path) if locks else None
        self._users = _users_of(path)

    def claim(self) -> None:
        """
        Raises:
            InUseError: another job is saving to it.
            StorageError: it cannot be made, or not be locked.
        """
        if self._lock is not None:
            durable.make_directory(self.path, durable=False)
            self._lock.acquire()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def take_name(self, rank: int, more: str = "") -> Path:
        """For a data file of this rank: one that no file there has, nor that of another save of this process that is under way.

        Also removes what killed processes of this host have left here.

        Args:
            more: stands behind the rank: "_frozen", or nothing.
        """
        names = names_in(self.path)
        found = [DATA_FILE.fullmatch(name) for name in names]
        taken = [int(match["number"]) for match in found if match is not None and int(match["rank"]) == rank]
        number = self._users.take_number(rank, taken)
        _remove_abandoned(self.path, names)
        return self.path / f"__{rank}{more}_{number}.distcp"

    def publish(self, metadata: bytes, manifest: Manifest | None, used: Mapping[str, int]) -> None:
        """Makes the files that are there under their own names, durably, the checkpoint.

            1. look whether they are                               another save may have removed them
            2. fsync of what the directory lies in
            3. write `.metadata` and the manifest aside, fsync     the checkpoint before stands
            4. rename to `.metadata`                               the new one, for whoever reads
            5. rename to manifest.json
            6. fsync of the directory                              the new one, for good

        Args:
            metadata: sealed.
            used: by name, how many bytes each file has at least.

        Raises:
            CorruptError: a file is not as its rank has written it, or not there any more.
            StorageError: a system call failed.
            InUseError: the directory is not ours any more.
        """
        with self._users.guard:
            if self._lock is not None:
                self._lock.assert_held()
            self._look_at(used, manifest)
            _sync_parents(self.path)
            self._give_names(metadata, manifest)
        durable.crash_point("manifest-renamed")

    def _look_at(self, used: Mapping[str, int], manifest: Manifest | None) -> None:
        exact = {} if manifest is None else {file.name: file.bytes for file in manifest.files if file.name != METADATA}
        for name, size in {**used, **exact}.items():
            path = self.path / name
            if not (has_size(path, size) if name in exact else _size_of(path) >= size):
                raise CorruptError(
                    f"'{path}' does not have the {size} bytes that its rank has written: not all ranks see the same directory, "
                    "or somebody else saves to it"
                )

    def _give_names(self, metadata: bytes, manifest: Manifest | None) -> None:
        contents = {METADATA: metadata} | ({} if manifest is None else {manifests.NAME: manifest.to_json()})
        aside = {name: temporary_names.temporary_path(self.path / name) for name in contents}
        try:
            for name, temporary in aside.items():
                durable.write_small_file(temporary, contents[name])
            durable.crash_point("metadata-written")
            durable.give_name(aside[METADATA], self.path / METADATA)
            durable.crash_point("metadata-renamed")
            if manifest is None:
                durable.remove_quietly(self.path / manifests.NAME)  # of a checkpoint that was there before
            else:
                durable.give_name(aside[manifests.NAME], self.path / manifests.NAME)
            durable.sync_directory(self.path)
        except BaseException:
            for temporary in aside.values():
                durable.remove_quietly(temporary)
            raise

    def holds(self, metadata: bytes) -> bool:
        """Whether that is what readers find."""
        try:
            return (self.path / METADATA).read_bytes() == metadata
        except OSError:
            return False

    def tidy(self, metadata: bytes, kept: Collection[str]) -> None:
        """Removes the files of former checkpoints, once a new one is durable. A failure is only logged.

        Args:
            metadata: of the new one. If another save has replaced that meanwhile, it is the one to tidy up.
            kept: names of the data files of the new one.
        """
        with self._users.guard:
            if self.holds(metadata):
                self._remove_all_but({*kept, *(sharded_files.checksums_path(Path(name)).name for name in kept)})

    def _remove_all_but(self, wanted: Collection[str]) -> None:
        try:
            for name in sorted(names_in(self.path)):
                if DATA_FILE.fullmatch(name) and name not in wanted:
                    durable.remove_file(self.path / name)
        except (CheckpointError, OSError) as error:
            logger.warning("tidying '%s' failed, the checkpoint is good: %s", self.path, error)


def place(temporary: Path, target: Path, checksums: bytes) -> None:
    """Gives a data file its name, durably, and puts its checksums beside it. No `.metadata` names it yet.

    Raises:
        StorageError: a system call failed; both are removed.
        CheckpointError: there is such a file.
    """
    beside = sharded_files.checksums_path(target)
    if os.path.lexists(target) or os.path.lexists(beside):
        raise CheckpointError(f"'{target}' was put there from elsewhere; it was not replaced: save again")
    durable.crash_point("before-rename")
    try:
        durable.write_small_file(beside, checksums)
        durable.rename_durably(temporary, target)
    except BaseException:
        remove(target)
        raise
    durable.crash_point("renamed")


def remove(target: Path) -> None:
    """A data file that will not be published, and its checksums."""
    durable.remove_quietly(target)
    durable.remove_quietly(sharded_files.checksums_path(target))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _remove_abandoned(directory: Path, names: Collection[str]) -> None:
    for name in names:
        match = temporary_names.TEMPORARY.fullmatch(name)
        if match is not None and temporary_names.is_abandoned(match):
            durable.remove_quietly(directory / name)


_durable: set[tuple[str, int, int]] = set()  # directories whose own names are known to last


def _sync_parents(path: Path) -> None:
    """Makes the name of a directory durable, and those of all above it that may be new, on its file system."""
    new = []
    for directory in (path, *path.parents):
        with contextlib.suppress(OSError):
            found = os.stat(directory)
            key = (str(directory), found.st_dev, found.st_ino)
            if key in _durable or directory.parent == directory or os.path.ismount(directory):
                break
            new.append(key)
        try:
            durable.sync_directory(directory.parent)
        except StorageError as error:
            if error.errno not in _UNSYNCABLE:
                raise
            break
    if len(_durable) + len(new) > _MOST_KNOWN:
        _durable.clear()
    _durable.update(new)


# ---- the checksum of `.metadata` -------------------------------------------------------------------------------------


def seal(metadata: bytes) -> bytes:
    return metadata + _SEAL.pack(_SEALED, _native.crc32(metadata))


def is_sealed(content: bytes) -> bool:
    """
    Raises:
        CorruptError: it is, and has changed since.
    """
    if len(content) < _SEAL.size:
        return False
    magic, crc = _SEAL.unpack_from(content, len(content) - _SEAL.size)
    if magic != _SEALED:
        return False
    if _native.crc32(memoryview(content)[: -_SEAL.size]) != crc:
        raise CorruptError("its bytes have changed: it fails its CRC-32")
    return True


def read_metadata(directory: Path) -> tuple[bytes, bool]:
    """What readers are to go by, and whether it is known to be as we have written it.

    Raises:
        CorruptError: it is ours, and damaged.
        OSError: it cannot be read.
    """
    path = directory / METADATA
    content = path.read_bytes()
    try:
        if is_sealed(content):
            return content, True
    except CorruptError as error:
        raise CorruptError(f"'{path}': {error}") from None
    try:
        manifest = manifests.read(directory)
    except NotACheckpointError:
        return content, False
    named = next((file for file in manifest.files if file.kind == SHARDED_METADATA), None)
    if named is None:
        return content, False
    # A step that was saved again may have a crash behind it, in which `.metadata` is still the old one.
    with contextlib.suppress(OSError):
        committed = (directory / named.name).read_bytes()
        if (len(committed), _native.crc32(committed)) == (named.bytes, named.crc32):
            return committed, True
    return content, False
