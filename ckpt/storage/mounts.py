"""What file system a path lies on, as the kernel's table of mounts has it. It asks no server, and so cannot hang on one."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

_TABLE = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")  # a blank in a path is \040


class Mount(NamedTuple):
    """
    Attributes:
        number: as in /proc/self/fdinfo.
        device: "major:minor"; that of the whole file system, also where parts of it have numbers of their own, as with btrfs.
        point: where it is mounted.
        kind: "ext4", "nfs4", "fuse.sshfs".
    """

    number: int
    device: str
    point: str
    kind: str
    source: str


def mount_of(path: Path) -> Mount | None:
    """Of a path that need not be there yet: of its nearest parent that is. None if that cannot be told."""
    there = nearest_existing(path)
    try:
        found = parse(_TABLE.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return None
    number = _mount_number(there)
    for mount in found:
        if mount.number == number:
            return mount
    real = os.path.realpath(there)
    above = [mount for mount in found if _is_below(real, mount.point)]
    longest = max((len(mount.point) for mount in above), default=0)
    return next((mount for mount in reversed(above) if len(mount.point) == longest), None)  # the last one hides the others


def parse(table: str) -> list[Mount]:
    """Lines that are no mounts are passed over."""
    found = []
    for line in table.splitlines():
        left, dash, right = line.partition(" - ")
        fields, behind = left.split(" "), right.split(" ")
        if dash and len(fields) >= 6 and len(behind) >= 2 and fields[0].isdecimal():
            found.append(Mount(int(fields[0]), fields[2], _unescaped(fields[4]), behind[0], _unescaped(behind[1])))
    return found


def nearest_existing(path: Path) -> Path:
    absolute = Path(os.path.abspath(path))
    return next((each for each in (absolute, *absolute.parents) if os.path.exists(each)), Path("/"))


def _mount_number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(":")
                if name == "mnt_id":
                    return int(value)
        finally:
            os.close(descriptor)
    return None


def _is_below(path: str, point: str) -> bool:
    return point == "/" or path == point or path.startswith(point + "/")


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
