"""Files that become part of a directory beside their own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ckpt.errors import StorageError


def carry_over(names: Iterable[str], source: Path, destination: Path, has: Callable[[Path], bool]) -> None:
    """Gives what `source` holds under these names, with all that is below, to `destination`, too. Not durable.

    What `destination` has already stays, and so does `source`.

    Args:
        has: whether a file that is not there yet is on its way to this path.

    Raises:
        StorageError: one of them cannot be read or written.
    """
    for name in names:
        path, target = source / name, destination / name
        try:
            if path.is_dir() and not path.is_symlink():
                target.mkdir(exist_ok=True)
                carry_over(sorted(os.listdir(path)), path, target, has)
            elif not has(target):
                _copy(path, target)
        except StorageError:
            raise
        except OSError as error:
            text = f"cannot carry '{path}' over to '{destination}': {error.strerror}"
            raise StorageError(error.errno or 0, text, str(path)) from error


def _copy(path: Path, target: Path) -> None:
    """As a second name where that can be had: another process may write a file of this name just now, which wins."""
    try:
        with contextlib.suppress(FileExistsError):
            os.link(path, target, follow_symlinks=False)
    except OSError:
        if not os.path.lexists(target):
            shutil.copy2(path, target, follow_symlinks=False)
