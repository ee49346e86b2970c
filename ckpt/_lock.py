"""Two jobs must not write to one directory.

A POSIX record lock, because the kernel drops it with the process, a forked child does not inherit it, and it works on network
file systems. It does not tell apart two owners in one process: a set of names does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
from pathlib import Path

from ckpt import _storage
from ckpt.errors import InUseError

logger = logging.getLogger("ckpt")

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[tuple[int, int, int]] = set()  # (pid, device, inode); guarded by _guard
_guard = threading.RLock()  # reentrant: a finalizer releases


class DirectoryLock:
    """Taken by acquire(), given back by release() or by the end of the process, however it ends."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._descriptor = -1
        self._key: tuple[int, int, int] | None = None

    def acquire(self) -> None:
        """Safe to call again.

        Raises:
            InUseError: somebody else has it; says who.
            StorageError: the lock file cannot be made.
        """
        if self._key is not None:
            return
        with _guard:
            # Looked at before it is opened: closing any descriptor of the file would drop the lock that this process has on it.
            with contextlib.suppress(FileNotFoundError):
                if _key_of(os.stat(self._path)) in _held:
                    raise self._in_use("another Checkpointer of this process")
            descriptor = _storage.open_lock_file(self._path)
            key = _key_of(os.fstat(descriptor))
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read(descriptor)
                os.close(descriptor)
                if error.errno in _UNSUPPORTED:
                    logger.warning(
                        "the file system of '%s' has no locks: nothing keeps two jobs apart in it", self._path.parent
                    )
                    return
                raise self._in_use(holder or "another process") from error
            _held.add(key)
        self._descriptor, self._key = descriptor, key
        _storage.sign_lock_file(descriptor, f"process {os.getpid()} on {socket.gethostname()}")

    def assert_held(self) -> None:
        """Takes it again if the process has lost it: it does when anything in it opens and closes the file, as copying a whole
        directory of checkpoints would.

        Raises:
            InUseError: somebody else has taken it meanwhile.
        """
        if self._key is None:
            return
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise self._in_use(_read(self._descriptor) or "another process") from error

    def release(self) -> None:
        """Safe to call again, and in a forked child, where there is nothing to release."""
        key, self._key = self._key, None
        if key is None or key[0] != os.getpid():
            return
        with _guard:
            _held.discard(key)
            os.close(self._descriptor)

    def _in_use(self, holder: str) -> InUseError:
        return InUseError(
            f"'{self._path.parent}' is being written to by {holder}: two jobs must not save into one directory. End that one "
            "first, or give this one a directory of its own"
        )


def _key_of(stat: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), stat.st_dev, stat.st_ino


def _read(descriptor: int) -> str:
    try:
        return os.pread(descriptor, 200, 0).decode(errors="replace")
    except OSError:
        return ""
