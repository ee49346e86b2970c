"""Files that are never written to again, and get a name in one directory after the other."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import weakref
from pathlib import Path
from typing import Any

from ckpt import _native
from ckpt.errors import StorageError
from ckpt.storage import durable

_WRITING = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class HeldFile:
    """One that is held open, whatever becomes of its names, and that nobody may write to any more.

    Args:
        path: where it is now.
        size: that it has, bytes.

    Raises:
        StorageError: it cannot be opened, or not be protected, or has another size.
    """

    _descriptor = -1

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            os.fchmod(self._descriptor, stat.S_IMODE(os.fstat(self._descriptor).st_mode) & ~_WRITING)
            self._seen = self._look()
        except OSError as error:
            self.close()
            raise StorageError(error.errno or 0, f"cannot hold '{path}': {error.strerror}", str(path)) from error
        _held.add(self)
        if self._seen[2] != size:
            self.close()
            raise StorageError(0, f"cannot hold '{path}': it does not have the {size} bytes that were written to it", str(path))

    def _look(self) -> tuple[int, ...]:
        found = os.fstat(self._descriptor)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid, found.st_gid

    def part(self, at: int, length: int) -> io.BufferedReader:
        """Bytes [at, at + length) of it, as a file for reading, which is not to outlive this."""
        return io.BufferedReader(_Part(self._descriptor, at, length))

    def is_as_it_was(self) -> bool:
        """Whether nobody has written to it, cut it, or may, as far as that can be seen; and it still has a name."""
        try:
            return self._descriptor >= 0 and self._look() == self._seen and os.fstat(self._descriptor).st_nlink > 0
        except OSError:
            return False

    def is_at(self, path: Path) -> bool:
        """Whether a name is one of this file's."""
        try:
            found = os.stat(path, follow_symlinks=False)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._seen[:2]

    def link(self, path: Path) -> str:
        """Gives it one more name; the directory is made if it is not there. Not durable before sync_directory().

        Returns:
            Why it has not got it; empty: it has.
        """
        try:
            durable.make_directory(path.parent, durable=False)
            refused, _ = _native.consult_fault("link", os.fsencode(path))
            if refused:
                raise OSError(refused, os.strerror(refused))
            if not self.is_as_it_was():
                return "it was written to, or removed, by somebody else"
            # By what is held, not by a name, under which there may be another file by now. Given the descriptor of a directory,
            # Python follows the link in /proc.
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.link(f"/proc/self/fd/{self._descriptor}", path.name, dst_dir_fd=directory, follow_symlinks=True)
            finally:
                os.close(directory)
        except (OSError, StorageError) as error:
            return getattr(error, "strerror", None) or str(error)
        if self.is_at(path) and self.is_as_it_was():
            return ""
        durable.remove_quietly(path)
        return "it was written to, or replaced, by somebody else"

    def close(self) -> None:
        """Safe to call again. If it has no name any more, its blocks are given back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self.close()


class _Part(io.RawIOBase):
    def __init__(self, descriptor: int, at: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._at, self._length = descriptor, at, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"no position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as room:
            wanted = max(0, min(len(room), self._length - self._position))
            found = os.pread(self._descriptor, wanted, self._at + self._position)
            room[: len(found)] = found
        self._position += len(found)
        return len(found)


_held: weakref.WeakSet[HeldFile] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked child links nothing: the parent alone is to keep blocks of files that have been removed."""
    for held in list(_held):
        held.close()


os.register_at_fork(after_in_child=_let_go_in_child)
