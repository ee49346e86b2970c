"""Names that go from one thing to another in one step, so that nobody ever finds nothing under them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from ckpt.errors import StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import TEMPORARY, is_abandoned, temporary_path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # of <linux/fs.h>
_REPLACED = ".replaced"  # ends the name behind a temporary one, of what had to give way
# Of file systems that cannot do it, as some of networks.
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Each gets the other's name, at once. False: the file system, or the C library, cannot do that; nothing was done.

    Raises:
        StorageError: it failed for another reason.
    """
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise StorageError(code, f"cannot exchange '{one}' and '{other}': {os.strerror(code)}", str(other))


def _renameat2() -> Callable[..., int] | None:
    found = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if found is None:
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    found.restype = ctypes.c_int
    made: Callable[..., int] = found
    return made


def name_directory(hidden: Path, final: Path) -> None:
    """Gives a directory whose files are durable its name, durably. What had the name goes, with all that is in it.

        1. exchange the two, or give the new one the name if there is no other
        2. fsync of the directory that they lie in                                   the new one, for good
        3. remove the old one

    Where names cannot be exchanged, the old one is renamed first: a crash just then leaves both of them under other names, and
    remove_abandoned() gives the old one its name back. A file, or a link, gets the name of another one by a rename.

    Nothing here tells whether a hidden directory is complete. A bundle has a manifest that does: directory/late_names.py goes
    the other way, and whoever comes behind a crash gives the new one its name.

    Raises:
        StorageError: a system call of 1 or 2 failed.
    """
    replaced = hidden
    if not _is_directory(hidden) and not _is_directory(final):
        durable.rename_durably(hidden, final)
        return
    if not os.path.lexists(final):
        durable.give_name(hidden, final)
    elif not exchange(hidden, final):
        replaced = _replace_by_two_renames(hidden, final)
    durable.sync_directory(final.parent)
    with contextlib.suppress(OSError):
        remove(replaced)


def _replace_by_two_renames(hidden: Path, final: Path) -> Path:
    """What the old one is called now."""
    replaced = temporary_path(final.with_name(final.name + _REPLACED))
    durable.give_name(final, replaced)
    try:
        durable.give_name(hidden, final)
    except StorageError:
        durable.give_name(replaced, final)
        raise
    return replaced


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def replace_link(link: Path, target: Path) -> None:
    """Lets `link` lead to `target`, relative to where it lies; durably. What had the name goes, also a whole directory.

    Raises:
        StorageError: a system call failed; what was there is there.
    """
    temporary = temporary_path(link)
    try:
        os.symlink(os.path.relpath(target, link.parent), temporary)
        name_directory(temporary, link)
    except BaseException as error:
        durable.remove_quietly(temporary)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(error.errno or 0, f"cannot link '{link}' to '{target}': {error.strerror}", str(link)) from error
        raise


def retire(path: Path) -> Path | None:
    """Takes the name of a file or directory from it; returns what is left to be removed, or None if there was nothing.

    Raises:
        StorageError: it keeps its name.
    """
    return durable.retire_directory(path) if os.path.lexists(path) else None


def remove(path: Path) -> None:
    """A file, a link as a link, or a directory with all that is in it. One that is not there is fine.

    Raises:
        StorageError: something of it is left.
    """
    if _is_directory(path):
        durable.remove_tree(path)
    elif os.path.lexists(path):
        durable.remove_file(path)


def remove_abandoned(directory: Path) -> None:
    """What killed processes of this host have left under temporary names. A failure leaves it there.

    What had a name that nothing has taken gets it back.
    """
    with contextlib.suppress(OSError):
        for path in list(directory.iterdir()):
            match = TEMPORARY.fullmatch(path.name)
            if match is not None and is_abandoned(match):
                with contextlib.suppress(OSError):
                    _remove_or_give_back(path, match["name"])


def _remove_or_give_back(path: Path, behind: str) -> None:
    final = path.with_name(behind.removesuffix(_REPLACED))
    if behind.endswith(_REPLACED) and not os.path.lexists(final):
        durable.rename_durably(path, final)
    else:
        remove(path)
