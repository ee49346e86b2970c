"""Files that are copied in large blocks, past the page cache where the file system can: that belongs to who trains.

A file that is being written may be taken up again where its last sync() has left it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path
from types import TracebackType

from ckpt import _native
from ckpt.errors import StorageError

ALIGNMENT = 4096  # of addresses, lengths and offsets: satisfies all known devices; a refusal falls back to the page cache
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
_MODE = 0o666  # the umask decides


class Block:
    """Memory for direct I/O: it begins at a page."""

    def __init__(self, size: int) -> None:
        assert size % ALIGNMENT == 0
        self._map = mmap.mmap(-1, size)
        self.memory = memoryview(self._map)
        self.size = size

    def close(self) -> None:
        self.memory.release()
        self._map.close()


class _BlockFile:
    def __init__(self, path: Path, flags: int, direct: bool) -> None:
        self.path = path
        self._flags = flags | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = -1
        self._direct = direct
        self._doing = "open"
        self._open()

    def _open(self) -> None:
        self._consult("open")
        if self._direct:
            try:
                self._descriptor = os.open(self.path, self._flags | os.O_DIRECT, _MODE)
                return
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise self._failed("open", error) from error
                self._direct = False
        try:
            self._descriptor = os.open(self.path, self._flags, _MODE)
        except OSError as error:
            raise self._failed("open", error) from error

    def _fall_back(self) -> None:
        """The file system may take O_DIRECT and refuse what is asked of it then."""
        self.close()
        self._direct = False
        self._open()

    def _consult(self, call: str) -> int:
        """Returns how many bytes a fault lets pass, or -1."""
        code, most = _native.consult_fault(call, os.fsencode(self.path))
        if code:
            raise self._failed(call, OSError(code, os.strerror(code)))
        return most

    def _failed(self, call: str, error: OSError) -> StorageError:
        return StorageError(error.errno or 0, f"{call} failed on '{self.path}': {error.strerror}", str(self.path))

    def _forget_pages(self, offset: int, length: int) -> None:
        """Those that are clean: what was copied is not read again here."""
        if not self._direct:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Safe to call again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class BlockReader(_BlockFile):
    """A finished file. A context manager.

    Raises:
        StorageError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        # A FIFO in its place must not hang whoever opens it.
        super().__init__(path, os.O_RDONLY | os.O_NONBLOCK, direct)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, block: Block, offset: int) -> int:
        """Fills the block, or as much of it as the file has behind `offset`, a multiple of ALIGNMENT; returns how much.

        Raises:
            StorageError: it cannot be read.
        """
        done = 0
        while done < block.size and offset + done < self.size:
            most = self._consult("pread")
            end = block.size if most < 0 else min(block.size, done + max(most, 1))
            try:
                count = os.preadv(self._descriptor, [block.memory[done:end]], offset + done)
            except OSError as error:
                if not self._direct or error.errno not in _REFUSALS:
                    raise self._failed("read", error) from error
                self._fall_back()
                continue
            if count == 0:
                break
            done += count
        self._forget_pages(offset, done)
        return done

    def __enter__(self) -> BlockReader:
        return self


class BlockWriter(_BlockFile):
    """A file that is made if it is not there, and written in any number of sittings. A context manager.

    Others may write other bytes of it at the same time: nothing is cut off before finish().

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        super().__init__(path, os.O_RDWR | os.O_CREAT, direct)

    def write(self, block: Block, begin: int, end: int, offset: int) -> None:
        """Bytes [begin, end) of the block, to `offset`. Multiples of ALIGNMENT, but for the end of what is last in the file.

        Raises:
            StorageError: it cannot be written.
        """
        while begin < end:
            most = self._consult("pwrite")
            length = end - begin if most < 0 else min(end - begin, max(most, 1))
            # A ragged end is written up to the next boundary, and cut off by finish().
            whole = -(-length // ALIGNMENT) * ALIGNMENT if self._direct and most < 0 else length
            try:
                count = os.pwrite(self._descriptor, block.memory[begin : begin + whole], offset)
            except OSError as error:
                if not self._direct or error.errno not in _REFUSALS:
                    raise self._failed("write", error) from error
                self._fall_back()
                continue
            count = min(count, end - begin)
            begin, offset = begin + count, offset + count

    def sync(self) -> None:
        """Makes what was written durable.

        Raises:
            StorageError: the device failed; what is durable is not known.
        """
        self._consult("fdatasync")
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._failed("fdatasync", error) from error
        self._forget_pages(0, 0)

    def finish(self, size: int | None) -> None:
        """Makes it durable, and closes it.

        Args:
            size: to which it is cut; None: another writer does that.

        Raises:
            StorageError: a system call failed.
        """
        try:
            if size is not None:
                self._consult("ftruncate")
                os.ftruncate(self._descriptor, size)
            self._consult("fsync")
            os.fsync(self._descriptor)
        except StorageError:
            raise
        except OSError as error:
            raise self._failed("fsync", error) from error
        self._forget_pages(0, 0)
        self.close()

    def __enter__(self) -> BlockWriter:
        return self
