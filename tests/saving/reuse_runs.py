"""Runs whose states change in part, on file systems that share blocks, and what became of their files."""

from __future__ import annotations

import array
import fcntl
import struct
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deadlines import patience
from mounting import MIB, mounted
from nursery import Ended, Nursery
from support import DEADLINE_S, assert_same, options

import ckpt

KINDS = ("xfs", "btrfs")
_FIEMAP, _SYNC, _SHARED, _LAST = 0xC020660B, 1, 0x2000, 1


# The way is the same on both; what asks the file system for more than that takes both by itself.
@pytest.fixture(params=["xfs", pytest.param("btrfs", marks=pytest.mark.slow)])
def sharing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that shares blocks."""
    with mounted(request.param, tmp_path / "disk", 320 * MIB) as place:
        yield place


class Run:
    """Saves and checks. `frozen` and `learning` are of some MiB each; the latter changes with every step.

    Attributes:
        hint: the saves are told that it does not change.
    """

    def __init__(self, place: Path, *, keep: int | None = None, frozen: int = 4, **changes: Any) -> None:
        self.directory = place / "run"
        self.checkpointer = ckpt.Checkpointer(self.directory, keep=keep, options=options(**changes))
        generator = torch.Generator().manual_seed(5)
        self.state = {
            "frozen": torch.randn(frozen * MIB // 4, generator=generator),
            "small": torch.arange(100),
            "learning": torch.randn(3 * MIB // 8, generator=generator),
            "step": 0,
        }
        self.saved: dict[int, Any] = {}
        self.hint: Any = None
        self.unread = 0  # bytes, of the last save
        self.step = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        self.checkpointer.close()

    def begin(self) -> ckpt.PendingSave:
        """The next step; what is saved is remembered."""
        self.step += 1
        self.state["learning"].mul_(1.01).add_(0.5)
        self.state["step"] = self.step
        self.saved[self.step] = {key: value.clone() if torch.is_tensor(value) else value for key, value in self.state.items()}
        return self.checkpointer.save(self.step, self.state, frozen=self.hint)

    def save(self) -> int:
        """Until it is durable, and right in the file. How many bytes were reused."""
        pending = self.begin()
        pending.result(DEADLINE_S)
        self.check(self.step)
        self.unread = pending.stats.unread_bytes
        return pending.stats.reused_bytes

    def file(self, step: int) -> Path:
        return self.directory / f"step-{step:012d}" / "state.pt"

    def check(self, *steps: int) -> None:
        """Every value, as torch reads it, and every checksum."""
        for step in steps:
            assert_same(self.saved[step], torch.load(self.file(step)))
            assert_same(self.saved[step], ckpt.load(self.file(step)))
            with zipfile.ZipFile(self.file(step)) as archive:
                assert archive.testzip() is None


def sync(place: Path) -> None:
    subprocess.run(["sync", "-f", str(place)], check=True, timeout=patience(60))


def shared_bytes(path: Path) -> int:
    """Of the file, in blocks that another one has, too, as the file system tells it."""
    sync(path)
    shared = start = 0
    with path.open("rb") as file:
        while True:
            request = array.array("B", struct.pack("=QQLLLL", start, (1 << 64) - 1 - start, _SYNC, 0, 64, 0) + bytes(64 * 56))
            fcntl.ioctl(file.fileno(), _FIEMAP, request)
            (count,) = struct.unpack_from("=L", request, 20)
            for index in range(count):
                logical, _, length, _, _, flags = struct.unpack_from("=QQQQQL", request, 32 + 56 * index)
                shared += length * bool(flags & _SHARED)
                start = logical + length
                if flags & _LAST:
                    return shared
            if count == 0:
                return shared


def start_ranks(
    program_of: str, nurseries: list[Nursery], directory: Path, world: int, steps: int, **crash: Any
) -> list[Ended]:
    """Of a module in tests/dist; until all have ended."""
    children = []
    for rank in range(world):
        request = {
            "directory": str(directory),
            "rank": rank,
            "world": world,
            "steps": steps,
            "crash_point": "",
            "crash_skip": 0,
        }
        program = f"from dist import {program_of}; {program_of}.run({request | crash!r}); {program_of}.leave()"
        children.append(nurseries[rank].start(program))
    return [child.wait() for child in children]
