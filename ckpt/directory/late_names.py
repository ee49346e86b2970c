"""Bundles whose directory gets its name last, when all of it is durable: who lists the directory never meets half of one.

    .lazyckpt-<name>.partial     until then
    .lazyckpt-<name>.replaced    what had the name before, until the new one has it
    .names.lock                  held by whoever gives a name just now: who saves, or who looks

Both lie directly in the root, also of a name with slashes. The manifest decides, as ever: what has one is complete, and gets
its name from whoever looks next, should a crash have come between. Without one it is removed by the next job that saves there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.errors import StorageError
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.exchange import exchange

logger = logging.getLogger("ckpt")

_PREFIX, _PARTIAL, _REPLACED = ".lazyckpt-", ".partial", ".replaced"
_LOCK = ".names.lock"
_NAMES_TAKE_LONG = "{holder} gives a checkpoint its name in '{directory}', and does not come to an end; is its storage away?"
_LONGEST_WAIT_S = 60.0
_LOOK_S = 0.005


def partial_of(root: Path, name: str) -> Path:
    """Where the bundle `name` is put together."""
    return _beside(root, name, _PARTIAL)


def name_behind(directory: str) -> str | None:
    """The name that is to come, given that of a directory; None if it has its own."""
    return _name_in(directory, _PARTIAL)


def is_replaced(directory: str) -> bool:
    """Whether a directory of this name is no bundle any more."""
    return _name_in(directory, _REPLACED) is not None


def replaced_by(directory: str) -> str | None:
    """The name that such a directory had; None for all others."""
    return _name_in(directory, _REPLACED)


def _beside(root: Path, name: str, suffix: str) -> Path:
    return root / f"{_PREFIX}{name.replace('%', '%25').replace('/', '%2F')}{suffix}"


def _name_in(directory: str, suffix: str) -> str | None:
    if not (directory.startswith(_PREFIX) and directory.endswith(suffix)):
        return None
    return directory[len(_PREFIX) : -len(suffix)].replace("%2F", "/").replace("%25", "%")


def refuse_obstacle(root: Path, name: str) -> None:
    """
    Raises:
        StorageError: what has the name is no directory, and so no checkpoint that may be replaced.
    """
    final = root / name
    if os.path.lexists(final) and not final.is_dir():
        text = f"cannot save to '{final}': there is something of that name, and it is no directory; remove it, or take another"
        raise StorageError(errno.ENOTDIR, text, str(final))


def give_name(partial: Path, root: Path, name: str) -> None:
    """Gives a bundle whose files are durable its name, durably. A directory that had it goes, with all that is in it.

    If somebody else has just done that, nothing is done.

    Raises:
        StorageError: a system call failed; complete() of bundles.py finishes it later.
        InUseError: others give names here, for too long.
    """
    with _naming(root):
        if os.path.lexists(partial / manifests.NAME):
            _give_name(partial, root, name)


def give_name_left_over(partial: Path, root: Path, name: str) -> None:
    """The same, for who only looks: what was written under the name behind the bundle stays, and so does the bundle."""
    with _naming(root):
        if not os.path.lexists(partial / manifests.NAME):
            return
        there, left = manifests.read_if_any(root / name), manifests.read_if_any(partial)
        if there is not None and left is not None and there.sequence > left.sequence:
            _remove_quietly(partial)  # what had the name before, whatever the clocks of who copied the directory say
            return
        if _newest_in(root / name) > os.stat(partial / manifests.NAME).st_mtime_ns:
            logger.warning(
                "'%s' was complete when a crash came; since then somebody has written to '%s', which is left alone. Remove one "
                "of them, or save this one again",
                partial,
                root / name,
            )
            return
        _give_name(partial, root, name)


def _newest_in(directory: Path) -> int:
    try:
        return max(os.lstat(path).st_mtime_ns for path in (directory, *directory.iterdir()))
    except OSError:
        return 0


def _naming(root: Path) -> contextlib.AbstractContextManager[None]:
    lock = DirectoryLock(root, name=_LOCK, refusal=_NAMES_TAKE_LONG, owner="another thread")
    return lock.waited_for(_LONGEST_WAIT_S, _LOOK_S)


def _give_name(partial: Path, root: Path, name: str) -> None:
    final, replaced = root / name, _beside(root, name, _REPLACED)
    durable.make_directory(final.parent, durable=True)
    if os.path.lexists(final):
        _remove(replaced)
        if exchange(partial, final):
            durable.crash_point("bundle-exchanged")
            durable.sync_directory(final.parent)
            durable.give_name(partial, replaced)
        else:
            durable.rename_durably(final, replaced)
            durable.crash_point("bundle-retired")
            durable.rename_durably(partial, final)
    else:
        durable.rename_durably(partial, final)
    if final.parent != root:
        durable.sync_directory(root)
    durable.crash_point("bundle-named")
    _remove_quietly(replaced)


def drop(partial: Path) -> None:
    """Removes what will not become a checkpoint; if it has become one, nothing."""
    if not os.path.lexists(partial / manifests.NAME):
        _remove_quietly(partial)


def settle(root: Path) -> None:
    """What a crash has left, once all that is complete has its name. Nothing is being saved here.

    Raises:
        OSError: the directory cannot be read.
    """
    found = list(root.iterdir())
    for path in found:
        if name_behind(path.name) is not None:
            drop(path)
    for path in found:
        if (name := _name_in(path.name, _REPLACED)) is not None:
            with _naming(root):
                if os.path.lexists(root / name):
                    _remove_quietly(path)
                elif os.path.lexists(path):  # what was to take its place is gone
                    durable.rename_durably(path, root / name)


def _remove(path: Path) -> None:
    if os.path.lexists(path):
        durable.remove_tree(path)


def _remove_quietly(path: Path) -> None:
    try:
        _remove(path)
    except OSError as error:
        logger.warning("'%s' is left over, and cannot be removed: %s", path, error)
