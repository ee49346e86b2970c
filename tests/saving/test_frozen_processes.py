"""Frozen tensors in files of their own: of several ranks, and of processes that are killed."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from choice import mostly_slow
from dist import frozen_rank
from nursery import Ended, Nursery, nurseries_of_ranks
from reuse_runs import start_ranks
from support import assert_same

import ckpt

pytestmark = pytest.mark.usefixtures("native")
MIB = 1 << 20
# From the second save of a process on each has one file that is linked, and one that is written.
POINTS = [
    *(("frozen-linked", skip) for skip in (0, 2)),
    *(("before-rename", skip) for skip in (0, 1, 2, 3, 4)),
    *(("renamed", skip) for skip in (1, 2, 3, 4)),
    *(("data-durable", skip) for skip in (1, 2)),
    *((point, 1) for point in ("prepared", "manifest-written", "manifest-renamed", "published", "tidied")),
    ("removal-begun", 0),
]
FAST = [("frozen-linked", 0), ("before-rename", 3), ("renamed", 3), ("manifest-written", 1), ("removal-begun", 0)]


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(2) as made:
        yield made


start = functools.partial(start_ranks, "frozen_rank")


def durable(ended: Ended) -> dict[int, int]:
    """By step: how much was not written."""
    return {int(step): int(reused) for step, reused in re.findall(r"^durable (\d+) (\d+) \d+$", ended.stdout, re.MULTILINE)}


def check(directory: Path, world: int, at_least: int) -> int:
    """Each checkpoint that is there has all its values; returns the newest, -1 if there is none."""
    steps = sorted(int(path.parent.name.removeprefix("step-")) for path in directory.glob("step-*/manifest.json"))
    assert max(steps, default=-1) >= at_least
    for step in steps:
        place = directory / f"step-{step:012d}"
        for rank in range(world):
            name = "state.pt" if world == 1 else f"rank-{rank:05d}.pt"
            assert_same(frozen_rank.state_at(rank + 1, step), ckpt.load(place / name))
    return max(steps, default=-1)


def test_each_rank_has_a_file_of_its_own(nurseries: list[Nursery], tmp_path: Path) -> None:
    """What is replicated stays together."""
    for ended in start(nurseries, tmp_path / "run", 2, 3):
        assert ended.returncode == 0, ended.stderr
        assert [reused >= 2 * MIB for reused in durable(ended).values()] == [False, True, True]
    assert check(tmp_path / "run", 2, 2) == 2
    place = tmp_path / "run" / "step-000000000002"
    names = [f"rank-0000{rank}{more}.pt" for rank in range(2) for more in (".frozen", "")]
    assert sorted(os.listdir(place)) == ["manifest.json", *names, "replicated.pt"]
    assert os.stat(place / "rank-00001.frozen.pt").st_nlink == 2, "of those that are kept"
    assert_same({"common": frozen_rank.state_at(0, 2)["frozen"]}, ckpt.load(place / "replicated.pt"))


@pytest.mark.parametrize(("point", "skip"), mostly_slow(POINTS, run=FAST))
def test_a_process_is_killed(point: str, skip: int, nurseries: list[Nursery], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    (killed,) = start(nurseries, directory, 1, 6, crash_point=point, crash_skip=skip)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = check(directory, 1, max(durable(killed), default=-1))
    (ended,) = start(nurseries, directory, 1, 2)
    assert ended.returncode == 0, ended.stderr
    assert [reused > 2 * MIB for reused in durable(ended).values()] == [False, True], "a new process writes it anew"
    assert check(directory, 1, newest + 2) == newest + 2
    left = {path.name for path in directory.rglob("*") if path.is_file()}
    assert left <= {"manifest.json", "state.pt", "state.frozen.pt", "latest", ".lock", "events.jsonl"}


@pytest.mark.slow
def test_one_of_two_ranks_is_killed(nurseries: list[Nursery], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    children = []
    for rank in range(2):
        request = {"directory": str(directory), "rank": rank, "world": 2, "steps": 6, "crash_skip": 0}
        request["crash_point"] = "frozen-linked" if rank == 1 else ""
        program = f"from dist import frozen_rank; frozen_rank.run({request!r}); frozen_rank.leave()"
        children.append(nurseries[rank].start(program))
    assert children[1].wait().returncode == -signal.SIGKILL
    ended = children[0].wait()
    assert ended.returncode != 0
    newest = check(directory, 2, max(durable(ended), default=-1))
    for again in start(nurseries, directory, 2, 2):
        assert again.returncode == 0, again.stderr
    assert check(directory, 2, newest + 2) == newest + 2
