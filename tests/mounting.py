"""File systems of a test's own, on images of a few megabytes, where this machine allows mounting them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from deadlines import patience

MIB = 1 << 20
# How to make one, and how small it can be. An image is sparse: only what is written takes room.
_MAKERS = {
    "ext4": (["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal"], 1 * MIB),
    "xfs": (["mkfs.xfs", "-q"], 320 * MIB),
    "btrfs": (["mkfs.btrfs", "-q"], 128 * MIB),
}


def run_or_skip(*command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"this machine has no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60))
    if done.returncode != 0:
        pytest.skip(f"'{' '.join(command)}' is not possible here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(kind: str, place: Path, size: int) -> Iterator[Path]:
    """An empty file system at `place`, which is made. Skips the test where that cannot be.

    Args:
        kind: "tmpfs", "ext4", "xfs" or "btrfs".
        size: bytes; some kinds cannot be so small, and are larger.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place.mkdir()
    if kind == "tmpfs":
        run_or_skip("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    else:
        maker, least = _MAKERS[kind]
        image = place.with_name(f"{place.name}.{kind}")
        with image.open("wb") as file:
            file.truncate(max(size, least))
        run_or_skip(*maker, str(image))
        run_or_skip("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=patience(60))


def free_bytes(place: Path) -> int:
    numbers = os.statvfs(place)
    return numbers.f_bavail * numbers.f_frsize


def fill(place: Path, leave_bytes: int) -> Path:
    """The file that is in the way."""
    ballast = place / "ballast"
    with ballast.open("wb") as file:
        while free_bytes(place) > leave_bytes:
            try:
                file.write(bytes(min(1 << 16, free_bytes(place) - leave_bytes)))
                file.flush()
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
        os.fsync(file.fileno())
    return ballast
