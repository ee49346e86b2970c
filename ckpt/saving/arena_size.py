"""How large the arena may become where it sizes itself (`Options.arena_bytes="auto"`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from ckpt.coordinator import launchers
from ckpt.options import FIRST_ARENA_BYTES

_SHARE = 0.4  # of the memory that is available, for the arenas of all ranks of this node
_SLACK = 1 / 16  # chunks are filled in part, and structure stands between tensors
_MORE = 64 << 20


def most_arena_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """The largest that it may become."""
    return max(FIRST_ARENA_BYTES, int(_SHARE * available_bytes() / local_ranks(environment)))


def needed_arena_bytes(device_bytes: int) -> int:
    """For a save with so many bytes on devices to be captured without waiting for the disk."""
    return int(device_bytes * (1 + _SLACK)) + _MORE


def local_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of this job on this node, as the launcher tells; 1 if it does not."""
    return launchers.local_ranks(environment) or 1


def available_bytes(root: Path = Path("/")) -> int:
    """Host memory that can be taken without swapping, within the limit of the control group, of which psutil knows nothing.

    Args:
        root: where the file systems of the kernel are mounted.
    """
    found = [int(psutil.virtual_memory().available)]
    for group in (root / "sys/fs/cgroup", root / "sys/fs/cgroup" / _own_group(root)):
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is not None:
            found.append(limit - (used or 0) + _cached(group))
    legacy = root / "sys/fs/cgroup/memory"
    limit, used = _number(legacy / "memory.limit_in_bytes"), _number(legacy / "memory.usage_in_bytes")
    if limit is not None:
        found.append(limit - (used or 0))
    return max(0, min(found))


def _own_group(root: Path) -> str:
    """Of control groups of version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[len("0::") :].lstrip("/") for line in lines if line.startswith("0::")), "")


def _cached(group: Path) -> int:
    """Pages of files count as used, but go when memory is wanted."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(None, 1) for line in lines)
    return int(fields.get("inactive_file", "0"))


def _number(path: Path) -> int | None:
    """None: there is no such file, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
