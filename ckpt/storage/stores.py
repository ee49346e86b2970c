"""Where copies of finished checkpoints may be kept: a local directory, or an object store (object_store.py).

A key is a text with "/" between its parts, as in "step-00000012/rank-00000.pt". It is never a pathlib.Path, which makes one
slash of the two in a URI.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from ckpt.errors import CorruptError, StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import is_temporary, temporary_path

_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """`bytes`: its size."""

    key: str
    bytes: int


class Store(Protocol):
    """What survives the process that puts it there. Each method may be called from any thread.

    Raises:
        StorageError: the store does not answer, or refuses; says what and where.
        ValueError: a key is empty, absolute, or has an empty, "." or ".." part.
    """

    def put(self, key: str, source: Path, crc32: int) -> None:
        """Copies a file there; durable on return, and under its key only when it is whole.

        Raises:
            CorruptError: the bytes that were read have another CRC-32; nothing is under the key then but what was before.
        """

    def replace(self, key: str, content: bytes) -> None:
        """Gives a small object this content, atomically; durable on return."""

    def open(self, key: str) -> BinaryIO:
        """For reading. The object that is there now, also if it is replaced meanwhile."""

    def list(self, prefix: str) -> list[StoredObject]:
        """Those whose keys begin with it, by key. What is not whole yet is not among them."""

    def remove(self, key: str) -> None:
        """One that is not there is fine. Durable on return."""


class LocalStore:
    """A directory of a local or shared POSIX file system; keys are paths in it.

    Args:
        root: made if missing.

    Raises:
        StorageError: it cannot be made or entered.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        durable.make_directory(root, durable=True)

    def put(self, key: str, source: Path, crc32: int) -> None:
        """See Store."""
        target = self._path(key)
        durable.make_directory(target.parent, durable=True)
        temporary = temporary_path(target)
        try:
            found = durable.copy_file(source, temporary, _CHUNK_BYTES)
            if found != crc32:
                raise CorruptError(
                    f"'{source}' has the CRC-32 {found:08x} where {crc32:08x} was expected: it is damaged, or was written to; "
                    f"it was not copied to '{target}'"
                )
            durable.rename_durably(temporary, target)
        except BaseException:
            durable.remove_quietly(temporary)
            raise

    def replace(self, key: str, content: bytes) -> None:
        """See Store."""
        target = self._path(key)
        durable.make_directory(target.parent, durable=True)
        durable.replace_durably(target, content, "stored")

    def open(self, key: str) -> BinaryIO:
        """See Store."""
        path = self._path(key)
        durable.refuse_irregular(path, "read")
        try:
            return path.open("rb")
        except OSError as error:
            raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error

    def list(self, prefix: str) -> list[StoredObject]:
        """See Store."""
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for directory, folders, names in os.walk(folder, onerror=_raise_but_absence):
            folders[:] = [name for name in folders if not is_temporary(name)]  # on their way out
            for name in names:
                path = Path(directory, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not is_temporary(name):
                    found += _as_stored(key, path)
        return sorted(found, key=lambda each: each.key)

    def remove(self, key: str) -> None:
        """See Store."""
        path = self._path(key)
        durable.remove_file(path)
        if path.parent.is_dir():
            durable.sync_directory(path.parent)

    def _path(self, key: str) -> Path:
        return self.root / expect_key(key)


def expect_key(key: str) -> str:
    """
    Raises:
        ValueError: see Store.
    """
    if not all(part not in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"a key is a relative path without '.' and '..', and {key!r} is none")
    return key


def _as_stored(key: str, path: Path) -> list[StoredObject]:
    """Nothing if it has just gone."""
    try:
        return [StoredObject(key, path.stat().st_size)]
    except FileNotFoundError:
        return []


def _raise_but_absence(error: OSError) -> None:
    if error.errno != errno.ENOENT:
        raise StorageError(
            error.errno or 0, f"cannot list '{error.filename}': {error.strerror}", str(error.filename)
        ) from error
