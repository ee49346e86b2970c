"""Two jobs must not write to one directory.

A POSIX record lock, because the kernel drops it with the process, a forked child does not inherit it, and it works on network
file systems. It does not tell apart two owners in one process: a table of them does. One that has nothing in flight gives way
to a new one of its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt.errors import InUseError
from ckpt.storage import durable

logger = logging.getLogger("ckpt")

NAME = ".lock"
_TWO_JOBS = (
    "'{directory}' is being written to by {holder}: two jobs must not save into one directory. End that one first, or give "
    "this one a directory of its own"
)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_FLOCK = "hhqqi"  # struct flock, as fcntl(2) has it: type, whence, start, length, pid
_held: dict[tuple[int, int, int], DirectoryLock] = {}  # by (pid, device, inode); guarded by _guard
_guard = threading.RLock()  # reentrant: a finalizer releases


class DirectoryLock:
    """Taken by acquire(), given back by release() or by the end of the process, however it ends.

    Args:
        give_way: called for another owner of this process who wants it: waits so many seconds until nothing is in flight, and,
            if the second argument says so, releases it; False if it does not. Default: it never gives way.
        name: of the lock file.
        refusal: what InUseError says; {directory} and {holder} stand for these.
        owner: what one is called that has it in this process.
    """

    def __init__(
        self,
        directory: Path,
        give_way: Callable[[float, bool], bool] | None = None,
        *,
        name: str = NAME,
        refusal: str = _TWO_JOBS,
        owner: str = "another Checkpointer",
    ) -> None:
        self._path = directory / name
        self._refusal = refusal
        self._owner = f"{owner} of this process"
        self._give_way = give_way
        self._descriptor = -1
        self._key: tuple[int, int, int] | None = None

    def acquire(self, timeout_s: float = 0.0) -> None:
        """Safe to call again.

        Args:
            timeout_s: how long to wait for another owner in this process to give way, seconds.

        Raises:
            InUseError: somebody else has it; says who.
            StorageError: the lock file cannot be made.
        """
        if self._key is not None:
            return
        self._ask_to_give_way(timeout_s, for_good=True)
        with _guard:
            # Looked at before it is opened: closing any descriptor of the file would drop the lock that this process has on it.
            if self._owner_here() is not None:
                raise self._in_use(self._owner)
            descriptor = durable.open_lock_file(self._path)
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
            _held[key] = self
        self._descriptor, self._key = descriptor, key
        durable.sign_lock_file(descriptor, f"process {os.getpid()} on {socket.gethostname()}")

    @contextlib.contextmanager
    def waited_for(self, timeout_s: float, look_s: float) -> Iterator[None]:
        """Held meanwhile; whoever has it is waited for, in another process too.

        Args:
            timeout_s: longest wait, seconds.
            look_s: seconds between two attempts.

        Raises:
            InUseError: somebody else has it for too long.
            StorageError: the lock file cannot be made.
        """
        end = time.monotonic() + timeout_s
        while True:
            try:
                self.acquire()
                break
            except InUseError:
                if time.monotonic() >= end:
                    raise
                time.sleep(look_s)
        try:
            yield
        finally:
            self.release()

    @property
    def held(self) -> bool:
        """False, too, where the file system has no locks."""
        return self._key is not None

    def expect_free(self, timeout_s: float) -> None:
        """Looks whether acquire() would come to its end, and takes nothing.

        Raises:
            InUseError: somebody else has it; says who.
        """
        if self._key is not None:
            return
        self._ask_to_give_way(timeout_s, for_good=False)
        with _guard:
            if self._owner_here() is None and (holder := _holder_elsewhere(self._path)) is not None:
                raise self._in_use(holder)

    def holder(self) -> str | None:
        """Who has it just now, in words; None: nobody, or that cannot be told. Takes nothing."""
        with _guard:
            owner = self._owner_here()
            return _holder_elsewhere(self._path) if owner is None else owner._owner

    def _ask_to_give_way(self, timeout_s: float, *, for_good: bool) -> None:
        with _guard:
            owner = self._owner_here()
        if owner is None:
            return
        # Not under the guard: what is waited for may need it.
        if owner._give_way is None or not owner._give_way(timeout_s, for_good):
            flight = "" if owner._give_way is None else f", which still had saves in flight after {timeout_s:g} s"
            raise self._in_use(f"{self._owner}{flight}")

    def _owner_here(self) -> DirectoryLock | None:
        """In this process; to be called under the guard."""
        with contextlib.suppress(OSError):
            return _held.get(_key_of(os.stat(self._path)))
        return None

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
            _held.pop(key, None)
            os.close(self._descriptor)

    def _in_use(self, holder: str) -> InUseError:
        return InUseError(self._refusal.format(directory=self._path.parent, holder=holder))


def _key_of(stat: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), stat.st_dev, stat.st_ino


def _holder_elsewhere(path: Path) -> str | None:
    """The process that has locked the file; None if there is none. Closes it: not for one that this process has locked."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with open(path, "rb") as file:
            found = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            return None if found[0] == fcntl.F_UNLCK else _read(file.fileno()) or "another process"
    except OSError:  # it is not there, or there are no locks
        return None


def _read(descriptor: int) -> str:
    try:
        return os.pread(descriptor, 200, 0).decode(errors="replace")
    except OSError:
        return ""
