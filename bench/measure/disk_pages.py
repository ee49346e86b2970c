"""From the page cache to the disk, and out of the page cache: of a file, or of a directory with all that is in it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Of one file, or of a directory's own entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(path: Path) -> None:
    """All that is in it, and the directory where it has its name."""
    for found in [path, *path.rglob("*"), path.parent]:
        if found.is_file() or found.is_dir():
            fsync_path(found)


def forget_pages(path: Path) -> None:
    """So that it is read from the disk. Only clean pages are dropped, so all is fsynced first."""
    for found in [path, *path.rglob("*")]:
        if not found.is_file():
            continue
        descriptor = os.open(found, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def drop_from_cache(directory: Path) -> None:
    """The files' pages; all that is cached, too, where that is allowed."""
    forget_pages(directory)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container: the files' own pages have been dropped
            Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")
