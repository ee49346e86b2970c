"""What lies under the name of a checkpoint before the Trainer saves it: files of a callback, or of an override."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from .transformers_private import is_of_trainer

_COMPLETE = {"manifest.json", "trainer_state.json"}  # what has one of them is a checkpoint


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether a directory with these names in it is to be replaced as a whole."""
    return not _COMPLETE.isdisjoint(names)


def of_others(names: Iterable[str]) -> list[str]:
    """Those that no Trainer gives to what it writes."""
    return sorted(name for name in names if not is_of_trainer(name) and name not in _COMPLETE)


def carry_over(names: Iterable[str], source: Path, destination: Path, has: Callable[[Path], bool]) -> None:
    """Makes files, and directories, part of a checkpoint; `source` stays as it is. What `destination` has already stays, too.

    Args:
        has: whether a file is on its way there.

    Raises:
        OSError: one of them cannot be read or written.
    """
    for name in names:
        path, target = source / name, destination / name
        if path.is_dir() and not path.is_symlink():
            target.mkdir(exist_ok=True)
            carry_over(sorted(os.listdir(path)), path, target, has)
        elif not has(target):
            _copy(path, target)


def _copy(path: Path, target: Path) -> None:
    """As a second name where that can be had: another rank may write a file of this name just now, which wins."""
    try:
        with contextlib.suppress(FileExistsError):
            os.link(path, target, follow_symlinks=False)
    except OSError:
        if not os.path.lexists(target):
            shutil.copy2(path, target, follow_symlinks=False)
