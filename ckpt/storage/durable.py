"""What the library changes on a file system, and when that survives a crash.

Steps whose order decides what survives a crash go through the native core, where each system call has its error text and its
fault hook.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ckpt import _native
from ckpt.errors import StorageError
from ckpt.storage.temporary_names import TEMPORARY, is_abandoned, is_temporary, temporary_path

_looked_after: set[Path] = set()  # by remove_stale()

crash_point = _native.crash_point


_KINDS = ((stat.S_ISDIR, "directory"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"), (stat.S_ISREG, "regular file"))
_LONGEST_PATH = 4095  # bytes: PATH_MAX of Linux without the zero behind
_LONGEST_NAME = 255
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def kind_of(mode: int) -> str:
    return next((kind for is_it, kind in _KINDS if is_it(mode)), "device")


def file_target(path: Path) -> Path:
    """Where a file that is saved to `path` goes: as with torch.save, a link stays, and what it leads to is replaced.

    Raises:
        StorageError: no file can be made there, or what is there is no regular file, which a rename would replace all the same.
        ValueError: the path has a zero byte.
    """
    try:
        target = path.resolve() if path.is_symlink() else path
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        _refuse_zero_byte(path)
        return target
    except (OSError, RuntimeError) as error:  # the latter: links in a circle, before Python 3.13
        raise _explained(f"cannot save to '{path}'", path, error) from error
    if stat.S_ISDIR(mode):
        raise StorageError(errno.EISDIR, f"cannot save to '{target}': it is a directory; name a file", str(target))
    if not stat.S_ISREG(mode):
        raise StorageError(
            errno.EINVAL, f"cannot save to '{target}': it is a {kind_of(mode)}, not a regular file; name another", str(target)
        )
    return target


def refuse_irregular(path: Path, doing: str) -> None:
    """What would hang whoever opens it, or has no end.

    Raises:
        StorageError: it is a FIFO, a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # whoever opens it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise StorageError(errno.EINVAL, f"cannot {doing} '{path}': it is a {kind_of(mode)}, not a regular file", str(path))


def _refuse_zero_byte(path: Path) -> None:
    if "\0" in str(path):  # the kernel would take what is before it
        raise ValueError(f"embedded null byte in {str(path)!r}")


def _explained(doing: str, path: Path, error: OSError | RuntimeError) -> StorageError:
    code = getattr(error, "errno", None) or errno.ELOOP
    return StorageError(code, f"{doing}: {_obstacle(path, code) or os.strerror(code)}", str(path))


def _obstacle(path: Path, code: int) -> str | None:
    """What is wrong with a path, and what to do about it."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        return f"the path has {len(os.fsencode(path))} bytes, at most {_LONGEST_PATH} are possible; choose a shorter one"
    for name in path.parts if code == errno.ENAMETOOLONG else ():
        if (length := len(os.fsencode(name))) > _LONGEST_NAME:
            return f"the name '{name[:40]}...' has {length} bytes, file systems take {_LONGEST_NAME}; choose a shorter name"
    if code == errno.ELOOP:
        return "its links lead in a circle; choose another path"
    if code in (errno.EACCES, errno.EPERM):
        return f"{os.strerror(code)}; check the permissions of the directories and the user that runs the job"
    for parent in reversed([path, *path.parents]):
        with contextlib.suppress(OSError):
            if parent.is_symlink() and not parent.exists():
                return (
                    f"'{parent}' is a link to '{os.readlink(parent)}', which does not exist; make that, or choose another path"
                )
            if parent.exists() and not parent.is_dir():
                kind = kind_of(parent.stat().st_mode)
                return f"'{parent}' is a {kind}, not a directory; choose another path"
    return None


class Directory:
    """One that stays the same whatever becomes of its name: what is done below `reach` follows a rename.

    Raises:
        StorageError: it is not there.
    """

    descriptor = -1  # also of one that was never made: __del__() looks at it

    def __init__(self, path: Path) -> None:
        self.path = path
        self.moved = False  # known once it is closed
        try:
            self.descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _explained(f"cannot open the directory '{path}'", path, error) from error
        linked = Path(f"/proc/self/fd/{self.descriptor}")
        self.reach = linked if self._is(linked) else path  # without /proc a rename is not followed, and ends in an error

    def _is(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.descriptor))
        except OSError:
            return False

    def now(self) -> Path:
        """What it is called now; the old name if that still leads there, or if it was removed."""
        if self.descriptor < 0 or self._is(self.path):
            return self.path
        with contextlib.suppress(OSError):
            if self._is(link := Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))):
                return link
        return self.path

    def is_at(self, path: Path) -> bool:
        return self._is(path)

    def close(self) -> None:
        """Safe to call again."""
        if self.descriptor >= 0:
            self.moved = self.now() != self.path
            descriptor, self.descriptor, self.reach = self.descriptor, -1, self.path
            os.close(descriptor)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def make_directory(path: Path, durable: bool) -> None:
    """With its parents. One that exists is fine. Not durable: without an fsync; sync_directory(parent) must follow.

    Raises:
        StorageError: it cannot be made, or not be entered.
        ValueError: the path has a zero byte.
    """
    _refuse_zero_byte(path)
    try:
        if not _is_directory(path):
            _native.make_directory(os.fsencode(path), durable)
        elif not _permits(path, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except StorageError as error:
        code = error.errno or 0
        if code not in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT):
            raise
        if (obstacle := _obstacle(path, code)) is None:
            raise
        raise StorageError(code, f"cannot make the directory '{path}': {obstacle}", str(path)) from None
    except OSError as error:
        raise _explained(f"cannot use the directory '{path}'", path, error) from error


def expect_directory(path: Path) -> None:
    """For who may call make_directory() later: makes nothing, but raises the same if it is plain that that would.

    Only the attempt shows other obstacles, such as a file system that is full, or takes no directories.
    """
    _refuse_zero_byte(path)
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in path.parts):
        code = errno.ENAMETOOLONG
        raise _explained(f"cannot use the directory '{path}'", path, OSError(code, os.strerror(code)))
    with contextlib.suppress(OSError):
        if not _is_directory(path):
            nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
            if nearest.is_dir() and _permits(nearest, os.W_OK | os.X_OK):
                return
    make_directory(path, durable=True)  # it is there; or something is in the way, and this says what


def _permits(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _is_directory(path: Path) -> bool:
    """
    Raises:
        OSError: that cannot be told.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def directory_of_target(path: Path) -> None:
    """
    Raises:
        StorageError: the directory of a file to be made is not there.
    """
    parent = path.parent
    if not os.path.isdir(parent):
        code = errno.ENOTDIR if os.path.exists(parent) else errno.ENOENT
        obstacle = _obstacle(parent, code) or f"the directory '{parent}' does not exist (was it removed?); make it first"
        raise StorageError(code, f"cannot save to '{path}': {obstacle}", str(path))


def sync_directory(path: Path) -> None:
    """Makes creations, renames and removals in it durable."""
    _native.sync_directory(os.fsencode(path))


def sync_tree(path: Path) -> None:
    """Makes files that somebody else has written durable: one, or all below a directory but what is on its way there.

    Raises:
        StorageError: a file cannot be read, or the device failed.
    """
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if not is_temporary(entry.name):
                sync_tree(entry)
        sync_directory(path)
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(error.errno or 0, f"fsync failed on '{path}': {error.strerror}", str(path)) from error


def give_name(temporary: Path, final: Path) -> None:
    """A rename; not durable before sync_directory()."""
    _native.rename_path(os.fsencode(temporary), os.fsencode(final))


def rename_durably(temporary: Path, final: Path) -> None:
    """1. rename over `final`; 2. fsync of the directory. Before 1 the old content stands, after 2 the new one for good."""
    _native.rename_path(os.fsencode(temporary), os.fsencode(final))
    sync_directory(final.parent)


def replace_durably(path: Path, content: bytes, crash_name: str, temporary: Path | None = None) -> None:
    """Gives the small file `path` this content, atomically: write aside, fsync, rename, fsync of the directory.

    Args:
        temporary: where to write it aside; stays there if this fails.
    """
    kept, temporary = temporary is not None, temporary or temporary_path(path)
    try:
        _native.write_small_file(os.fsencode(temporary), content)
        crash_point(f"{crash_name}-written")
        rename_durably(temporary, path)
    except BaseException:
        if not kept:
            remove_quietly(temporary)
        raise
    crash_point(f"{crash_name}-renamed")


def make_durable(files: Mapping[Path, bytes], directories: Iterable[Path]) -> None:
    """write_small_file() of each file and sync_directory() of each directory. All are written before the first is waited for.

    A file system that keeps a journal writes it once then, rather than once for each.
    """
    small = [(os.fsencode(path), content) for path, content in files.items()]
    _native.make_durable(small, [os.fsencode(path) for path in directories])


def write_small_file(path: Path, content: bytes) -> None:
    """Its content is durable then, its name only once sync_directory() has been called behind it."""
    _native.write_small_file(os.fsencode(path), content)


def replace_quickly(path: Path, content: bytes) -> None:
    """Gives the small file `path` this content, atomically, but without an fsync of the directory: not to survive a crash.

    Raises:
        StorageError: if its `filename` is not `path`, that was certainly not touched.
    """
    temporary = temporary_path(path)
    try:
        _native.write_small_file(os.fsencode(temporary), content)
        _native.rename_path(os.fsencode(temporary), os.fsencode(path))
    except BaseException:
        remove_quietly(temporary)
        raise


def copy_file(source: Path, target: Path, chunk_bytes: int, told: Callable[[int], object] = lambda _: None) -> int:
    """Makes `target` a copy, which is fsynced; returns the CRC-32 of the bytes that were read. Its name is not durable yet.

    Args:
        told: called with the bytes of each chunk, once it is written.

    Raises:
        StorageError: one cannot be read, or the other not be written; what there is of `target` stays.
    """
    crc, chunk = 0, memoryview(bytearray(chunk_bytes))
    refuse_irregular(source, "copy")
    try:
        with source.open("rb", buffering=0) as read, target.open("xb", buffering=0) as written:
            while count := read.readinto(chunk):
                crc = _native.crc32(chunk[:count], crc)
                rest = chunk[:count]
                while rest:
                    rest = rest[written.write(rest) :]
                told(count)
            os.fsync(written.fileno())
    except OSError as error:
        raise StorageError(
            error.errno or 0, f"copying '{source}' to '{target}' failed: {error.strerror}", str(target)
        ) from error
    return crc


def make_empty_file(path: Path) -> None:
    """One that is there is fine. Not durable before sync_directory(), but no later than what is done there after it.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot make '{path}': {error.strerror}", str(path)) from error


def open_lock_file(path: Path) -> int:
    """A descriptor to lock; the file is made if it is not there.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot open '{path}': {error.strerror}", str(path)) from error


def sign_lock_file(descriptor: int, owner: str) -> None:
    """Says whose it is, for the message to whoever comes next."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)


def remove_file(path: Path) -> None:
    """A file that is not there is fine."""
    _native.remove_file(os.fsencode(path))


def remove_if_empty(directory: Path) -> None:
    """One that holds something, or is gone, is left as it is."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def remove_quietly(path: Path) -> None:
    """On the way out of an error: a second error must not hide the first."""
    with contextlib.suppress(OSError):
        _native.remove_file(os.fsencode(path))


def remove_stale(target: Path) -> None:
    """Removes what processes of this host that were killed left of their saves to `target`; looks once for each target."""
    if target in _looked_after:
        return
    _looked_after.add(target)
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            match = TEMPORARY.fullmatch(path.name)
            if match is not None and match["name"] == target.name and is_abandoned(match):
                remove_quietly(path)


def retire_directory(directory: Path) -> Path:
    """Gives a directory a temporary name, so that it is no checkpoint any more; returns that. An fsync must follow."""
    retired = temporary_path(directory)
    _native.rename_path(os.fsencode(directory), os.fsencode(retired))
    return retired


def remove_tree(directory: Path) -> None:
    """As much of it as can be removed. A link goes as a link: what it leads to is not ours.

    Raises:
        StorageError: something is left; the first cause.
    """
    if directory.is_symlink():
        remove_file(directory)
        return
    failed: OSError | None = None
    with os.scandir(directory) as entries:
        found = list(entries)
    for entry in found:
        try:
            (remove_tree if entry.is_dir(follow_symlinks=False) else remove_file)(Path(entry.path))
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    _native.remove_directory(os.fsencode(directory))


def link_or_rename(source: Path, target: Path) -> None:
    """Gives a file a second name, so that it stays under the first if the second goes; where there are no links, another one.

    Raises:
        StorageError: neither can be done; EEXIST if there is something else under `target`.
    """
    try:
        refused, _ = _native.consult_fault("link", os.fsencode(target))
        if refused:
            raise OSError(refused, os.strerror(refused))
        os.link(source, target, follow_symlinks=False)
    except FileExistsError as error:
        if os.path.samestat(os.lstat(source), os.lstat(target)):
            return
        raise StorageError(errno.EEXIST, f"'{target}' is there already", str(target)) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            text = f"cannot link '{source}' to '{target}': {error.strerror}"
            raise StorageError(error.errno or 0, text, str(target)) from error
        if os.path.lexists(target):  # a rename would take its place
            raise StorageError(errno.EEXIST, f"'{target}' is there already", str(target)) from error
        give_name(source, target)
