"""Saves that share blocks, by several ranks in one file, and by processes that are killed: all that is there is whole."""

from __future__ import annotations

import functools
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from dist import reuse_rank
from nursery import Ended, Nursery, nurseries_of_ranks
from reuse_runs import shared_bytes, sharing, start_ranks  # noqa: F401  sharing is a fixture
from support import assert_same

import ckpt

pytestmark = pytest.mark.usefixtures("native")
MIB = 1 << 20
# A save passes "blocks-shared" for each run of pieces, of which there are some 50 from the third save of a process on.
POINTS = [
    *(("blocks-shared", skip) for skip in (0, 1, 20, 70, 120)),
    ("chunk-written", 170),
    ("data-durable", 3),
    ("published", 3),
]


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(2) as made:
        yield made


start = functools.partial(start_ranks, "reuse_rank")


def durable(ended: Ended) -> dict[int, tuple[int, int]]:
    """By step: how much was reused, of how much."""
    found = re.findall(r"^durable (\d+) (\d+) (\d+)$", ended.stdout, re.MULTILINE)
    return {int(step): (int(reused), int(total)) for step, reused, total in found}


def check(directory: Path, world: int, at_least: int) -> int:
    """Each checkpoint that is there has all its values; returns the newest."""
    steps = sorted(int(path.parent.name.removeprefix("step-")) for path in directory.glob("step-*/manifest.json"))
    assert steps and steps[-1] >= at_least
    for step in steps:
        place = directory / f"step-{step:012d}"
        for rank in range(world):
            name = "state.pt" if world == 1 else f"rank-{rank:05d}.pt"
            assert_same(reuse_rank.state_at(rank + 1, step), ckpt.load(place / name))
        if world > 1:
            assert_same(reuse_rank.state_at(0, step), ckpt.load(place / "replicated.pt"))
    return steps[-1]


def test_two_ranks_write_one_file(sharing: Path, nurseries: list[Nursery]) -> None:  # noqa: F811
    directory = sharing / "run"
    ranks = start(nurseries, directory, 2, 6)
    for ended in ranks:
        assert ended.returncode == 0, ended.stderr
        told = durable(ended)
        assert [told[step][0] for step in (0, 1)] == [0, 0]
        assert all(told[step][0] > 4 * MIB for step in range(2, 6))
    assert check(directory, 2, 5) == 5
    files = json.loads((directory / "step-000000000005" / "manifest.json").read_text())["files"]
    (common,) = [file for file in files if file["kind"] == "replicated"]
    assert common["shared_bytes"] > 3 * MIB and common["shared_step"] == 4
    assert shared_bytes(directory / "step-000000000005" / common["name"]) > 3 * MIB


@pytest.mark.parametrize(("point", "skip"), POINTS)
def test_killed_while_blocks_are_shared(sharing: Path, nurseries: list[Nursery], point: str, skip: int) -> None:  # noqa: F811
    directory = sharing / "run"
    (ended,) = start(nurseries, directory, 1, 40, crash_point=point, crash_skip=skip)
    assert ended.returncode == -signal.SIGKILL, "it never came to the crash point"
    told = durable(ended)
    step = check(directory, 1, max(told))
    (ended,) = start(nurseries, directory, 1, 4)
    assert ended.returncode == 0, ended.stderr
    assert [reused > 0 for reused, _ in durable(ended).values()] == [False, False, True, True], "a process trusts its own files"
    assert check(directory, 1, step + 4) == step + 4
