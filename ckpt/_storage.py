"""Everything that this package changes on a file system, in one place.

Steps whose order decides what survives a crash go through the native core, where each system call has its error text and its
fault hook. Names chosen here:

    .tmp-<name>-<pid>-<number>    on its way; ignored by restore, removed by the next save to the directory
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

from ckpt import _native

TEMPORARY_PREFIX = ".tmp-"
_numbers = itertools.count()

crash_point = _native.crash_point


def temporary_path(final: Path) -> Path:
    """A name beside `final` that no other save uses."""
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{os.getpid()}-{next(_numbers)}")


def is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY_PREFIX)


def make_directory(path: Path, durable: bool) -> None:
    """With its parents. One that exists is fine. Not durable: without an fsync; sync_directory(parent) must follow."""
    if not path.is_dir():
        _native.make_directory(os.fspath(path), durable)


def sync_directory(path: Path) -> None:
    """Makes creations, renames and removals in it durable."""
    _native.sync_directory(os.fspath(path))


def rename_durably(temporary: Path, final: Path) -> None:
    """1. rename over `final`; 2. fsync of the directory. Before 1 the old content stands, after 2 the new one for good."""
    _native.rename_path(os.fspath(temporary), os.fspath(final))
    sync_directory(final.parent)


def replace_durably(path: Path, content: bytes, crash_name: str) -> None:
    """Gives the small file `path` this content, atomically: write aside, fsync, rename, fsync of the directory."""
    temporary = temporary_path(path)
    try:
        _native.write_small_file(os.fspath(temporary), content)
        crash_point(f"{crash_name}-written")
        rename_durably(temporary, path)
    except BaseException:
        remove_quietly(temporary)
        raise
    crash_point(f"{crash_name}-renamed")


def remove_file(path: Path) -> None:
    """A file that is not there is fine."""
    _native.remove_file(os.fspath(path))


def remove_if_empty(directory: Path) -> None:
    """One that holds something, or is gone, is left as it is."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def remove_quietly(path: Path) -> None:
    """On the way out of an error: a second error must not hide the first."""
    with contextlib.suppress(OSError):
        _native.remove_file(os.fspath(path))


def remove_tree(directory: Path, first: str | None = None) -> None:
    """Removes a directory with all it holds; `first` is the name in it to remove before all others, durably."""
    if first is not None and (directory / first).exists():
        remove_file(directory / first)
        sync_directory(directory)
        crash_point("removal-begun")
    with os.scandir(directory) as entries:
        for entry in list(entries):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                remove_tree(path)
            else:
                remove_file(path)
    _native.remove_directory(os.fspath(directory))
