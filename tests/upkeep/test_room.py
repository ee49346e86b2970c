"""What checkpoints take of the disk that they share, and what removing some gives back, by what the file system has then."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from deadlines import patience
from mounting import MIB, free_bytes
from reuse_runs import KINDS, Run, sharing, sync  # noqa: F401  sharing is a fixture
from support import wait_until

from ckpt.upkeep.room import Room

SLACK = MIB // 2  # for the file system's own


def steps_in(directory: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(directory.glob("step-*"))}


def expect_given_back(place: Path, expected: int, paths: Iterable[Path], exactly: bool = True) -> None:
    """By removing them. XFS frees some time after that.

    Args:
        exactly: no more than that, either.
    """
    sync(place)
    before = free_bytes(place)
    for path in paths:
        shutil.rmtree(path)

    def is_given_back() -> bool:
        sync(place)
        return free_bytes(place) - before > expected - SLACK

    wait_until(is_given_back, what=f"giving back {expected} bytes")
    assert not exactly or free_bytes(place) - before < expected + SLACK


def test_a_directory_without_sharing(tmp_path: Path) -> None:
    for name, size in (("a", MIB), ("b", 2 * MIB)):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "file").write_bytes(os.urandom(size))
    room = Room({name: tmp_path / name for name in ("a", "b", "absent")})
    assert room.freed_by_each() == {"a": MIB, "b": 2 * MIB} and room.taken == 3 * MIB == room.freed_by(["a", "b"])


def test_files_with_several_names(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own").write_bytes(os.urandom(MIB))
    (tmp_path / "a" / "frozen").write_bytes(os.urandom(4 * MIB))
    os.link(tmp_path / "a" / "frozen", tmp_path / "b" / "frozen")
    room = Room({name: tmp_path / name for name in ("a", "b", "c")})
    assert room.freed_by_each() == {"a": MIB, "b": MIB, "c": MIB} and room.taken == 7 * MIB
    assert room.freed_by(["a", "b"]) == 6 * MIB and room.freed_by(["a", "c"]) == 2 * MIB
    os.link(tmp_path / "a" / "frozen", tmp_path / "elsewhere")
    assert Room({name: tmp_path / name for name in ("a", "b")}).freed_by(["a", "b"]) == 2 * MIB


@pytest.mark.parametrize("sharing", KINDS, indirect=True)
def test_what_removing_would_free_is_what_it_frees(sharing: Path) -> None:  # noqa: F811
    with Run(sharing, frozen=16, refresh_every=5) as run:
        for _ in range(9):
            run.save()
    steps = steps_in(run.directory)
    names = list(steps)
    room = Room(steps)
    sync(sharing)
    own = room.freed_by_each()
    assert own[names[0]] > 16 * MIB and own[names[3]] < 4 * MIB
    assert room.taken < 4 * 16 * MIB < sum(run.file(step).stat().st_size for step in range(9))
    # btrfs frees an extent as a whole, when nobody has any of it any more: later, and then more at once.
    exactly = "xfs" in str(next(sharing.parent.glob("disk.*")))
    for going in ([names[3]], names[1:3], [names[4], names[5]]):
        expected = Room(steps_in(run.directory)).freed_by(going)
        expect_given_back(sharing, expected, (steps[name] for name in going), exactly)
    left = steps_in(run.directory)
    expected = Room(left).freed_by(left)
    assert 2 * 16 * MIB < expected <= Room(left).taken and (expected == Room(left).taken or not exactly)
    expect_given_back(sharing, expected, left.values(), exactly)


def test_a_copy_elsewhere_that_shares_keeps_the_room(sharing: Path) -> None:  # noqa: F811
    with Run(sharing, frozen=16, reuse=False) as run:
        run.save()
    subprocess.run(["cp", "--reflink=always", str(run.file(0)), str(sharing / "copy")], check=True, timeout=patience(60))
    steps = steps_in(run.directory)
    room = Room(steps)
    assert room.taken > 16 * MIB and room.freed_by(steps) < MIB
    sync(sharing)
    before = free_bytes(sharing)
    shutil.rmtree(run.directory)
    sync(sharing)
    assert free_bytes(sharing) - before < MIB
