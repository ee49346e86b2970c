"""Two ranks save a sharded model together: killed at every point of the protocol, with a full disk, with states that differ."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as td
from choice import in_turn, mostly_slow
from nursery import Child, Ended, Nursery, sharding_nurseries
from support import stop, wait_until
from test_commit import ALL_RANKS, IMPATIENT, RANK_0_ONLY

from ckpt import _native
from ckpt.directory.sharded_files import PieceChecksums

# Where rank 0 writes `.metadata`, and, of a step that is saved again, its copy.
METADATA_POINTS = ["metadata-written", "metadata-renamed"]
COPY_POINTS = ["metadata-copy-written", "metadata-copy-renamed"]
POINTS = [point for point in (*RANK_0_ONLY, *METADATA_POINTS) if point not in ("shares-written", "removal-begun")]
LEFT_ALONE: dict[str, Any] = {"options": IMPATIENT, "patience": 1}

pytestmark = pytest.mark.usefixtures("native")


class Told:
    """What one rank said."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended
        self.found = re.findall(r"^found (-?\d+) (\S+)$", ended.stdout, re.MULTILINE)
        self.durable = {int(step): text for step, text in re.findall(r"^durable (\d+) (\S+)$", ended.stdout, re.MULTILINE)}
        failed = re.findall(r"^failed (\d+) (\w+): (.*)$", ended.stdout, re.MULTILINE)
        self.failed = {int(step): (kind, text) for step, kind, text in failed}
        self.layouts = [int(size) for size in re.findall(r"^layout (\d+)$", ended.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(2) as made:
        yield made


Start = Callable[..., list[Child]]
Run = Callable[..., list[Told]]


@pytest.fixture
def start(nurseries: list[Nursery], tmp_path: Path) -> Start:
    numbers = iter(range(100))

    def start(*each: dict[str, Any], **common: Any) -> list[Child]:
        meeting = str(tmp_path / f"meeting-{next(numbers)}")
        children: list[Child] = []
        for rank in range(2):
            request = {"directory": str(tmp_path / "steps"), "meeting": meeting, "rank": rank, "world": 2} | common
            request |= each[rank] if each else {}
            children.append(nurseries[rank].start(f"from dist import sharded_trainer; sharded_trainer.main({request!r})"))
        return children

    return start


@pytest.fixture
def run(start: Start) -> Run:
    return lambda *each, **common: [Told(child.wait()) for child in start(*each, **common)]


def ended_well(told: list[Told]) -> list[Told]:
    assert [each.ended.returncode for each in told] == [0, 0], told[0].ended.stderr + told[1].ended.stderr
    return told


def step_directory(directory: Path, step: int) -> Path:
    return directory / "steps" / f"step-{step:012d}"


def assert_whole(directory: Path, step: int) -> None:
    """All files are as the manifest says, and so is each piece of a data file."""
    folder = step_directory(directory, step)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    kinds = sorted((file["kind"], file["rank"]) for file in files)
    expected = [(kind, rank) for kind in ("sharded", "sharded-checksums") for rank in (0, 1)] + [("sharded-metadata", 0)]
    assert kinds == expected
    for file in files:
        content = (folder / file["name"]).read_bytes()
        assert (len(content), _native.crc32(content)) == (file["bytes"], file["crc32"])
        if file["kind"] == "sharded":
            pieces = PieceChecksums.parse((folder / file["name"]).with_suffix(".crc32").read_bytes())
            size = pieces.piece_bytes
            found = [_native.crc32(content[at : at + size]) for at in range(0, len(content), size)]
            assert pieces.file_bytes == len(content) and list(pieces.crc32s) == found


def test_steps_are_saved_and_found(run: Run, tmp_path: Path) -> None:
    told = ended_well(run(steps=3))
    assert told[0].durable == told[1].durable and [*told[0].durable] == [0, 1, 2]
    assert len({*told[0].durable.values()}) == 3, "the model has learnt meanwhile"
    for step in range(3):
        assert_whole(tmp_path, step)
    again = ended_well(run(first=3, steps=1))
    assert [each.found for each in again] == [[("2", told[0].durable[2])]] * 2


def test_an_unchanged_layout_is_not_sent_again(run: Run) -> None:
    told = ended_well(run(steps=5, plan={"3": {"grow": 70}, "9": {}}))
    for rank in told:
        assert [*rank.durable] == [0, 1, 2, 3, 4]
        assert rank.layouts[0] > 200 and all(size < 200 for size in rank.layouts[1:3])
    assert any(rank.layouts[3] > 200 for rank in told), "the value has grown, and what lies behind it has moved"
    assert any(rank.layouts[4] > 200 for rank in told)


def test_rank_0_asks_for_a_layout_that_it_does_not_know(run: Run, tmp_path: Path) -> None:
    told = ended_well(run({"plan": {"2": {"forget": True}}}, {"plan": {"9": {}}}, steps=4))
    for rank in told:
        assert [*rank.durable] == [0, 1, 2, 3] and all(size < 200 for size in rank.layouts[1:])
    assert_whole(tmp_path, 2)
    assert ended_well(run(first=4, steps=0))[0].found[0][0] == "3"


def test_a_step_is_saved_again(run: Run, tmp_path: Path) -> None:
    ended_well(run(steps=2, plan={"1": {"twice": True}}))
    folder = step_directory(tmp_path, 1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".metadata", ".metadata-2", "__0_1.crc32", "__0_1.distcp", "__1_1.crc32", "__1_1.distcp", "manifest.json"]
    assert (folder / ".metadata").read_bytes() == (folder / ".metadata-2").read_bytes()
    assert_whole(tmp_path, 1)


# ---- refused, on all ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"own": 5}, "the sharded state is not the same on all ranks"),
        ({"drop": "progress"}, "the sharded state is not the same"),
    ],
    ids=["value", "keys"],
)
def test_what_differs_is_found(change: dict[str, Any], text: str, run: Run, tmp_path: Path) -> None:
    told = ended_well(run({"plan": {"9": {}}}, {"plan": {"1": change}}, steps=3))
    for rank in told:
        assert [*rank.durable] == [0, 2]
        assert text in rank.failed[1][1] and "rank 1" in rank.failed[1][1]
    assert not list(step_directory(tmp_path, 1).glob("*.distcp")), "nobody has left a file behind"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("call", ["open", "fallocate", "pwritev", "fdatasync", "rename"])
def test_a_full_disk_on_one_rank(call: str, rank: int, run: Run, tmp_path: Path) -> None:
    bad = {"plan": {"1": {"fault": {"call": call, "path_part": f"__{rank}_0.distcp", "error": 28}}}}
    told = ended_well(run(*[bad if each == rank else {"plan": {"9": {}}} for each in range(2)], steps=3))
    for each in told:
        assert [*each.durable] == [0, 2] and "No space left" in each.failed[1][1]
    folder = step_directory(tmp_path, 1)
    assert not folder.exists() or not [path for path in folder.iterdir() if not path.name.startswith(".tmp-")]
    assert_whole(tmp_path, 2)


@pytest.mark.parametrize("call", ["open", "write", "rename"])
def test_metadata_that_cannot_be_written(call: str, run: Run, tmp_path: Path) -> None:
    bad = {"plan": {"1": {"fault": {"call": call, "path_part": "metadata", "error": 28}}}}
    told = ended_well(run(bad, {"plan": {"9": {}}}, steps=3))
    for each in told:
        assert [*each.durable] == [0, 2] and "No space left" in each.failed[1][1]
    assert not list(step_directory(tmp_path, 1).glob("*.distcp"))


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_for_a_while(victim: int, start: Start, run: Run, tmp_path: Path) -> None:
    """The saves that it misses are given up; when it is back, both save again. They do not train, for which one would wait for
    the other, maybe without a save in flight."""
    slowly = {str(step): {"sleep_s": 0.25, "still": True} for step in range(16)}
    # Of a store that is a file a rank may hold the lock when it is stopped, and then nobody has a deadline.
    store = td.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = start(steps=16, plan=slowly, options=IMPATIENT, port=store.port)
    wait_until(lambda: any((tmp_path / "steps").glob("step-*/manifest.json")), what="the first checkpoint")
    stop(children[victim].pid)
    try:
        wait_until(lambda: "failed " in children[1 - victim].said(), what="a save that the other gives up")
    finally:
        os.kill(children[victim].pid, signal.SIGCONT)
    told = ended_well([Told(child.wait()) for child in children])
    first = min(told[1 - victim].failed)
    assert f"rank {victim}" in told[1 - victim].failed[first][1]
    newest = {max(each.durable) for each in told}
    assert min(newest) > first
    assert victim == 0 or first not in told[victim].durable, "rank 0 alone may have published before it hung"
    for step in {*told[0].durable, *told[1].durable}:
        assert_whole(tmp_path, step)
    assert ended_well(run(first=20, steps=1))[0].found[0][0] == str(max(newest))


# ---- killed ----------------------------------------------------------------------------------------------------------


KILLS = [(p, v) for p in ALL_RANKS for v in (0, 1)] + [(p, 0) for p in POINTS]


@pytest.mark.parametrize(("point", "victim"), mostly_slow(KILLS, run=[*in_turn(ALL_RANKS), *((p, 0) for p in POINTS)]))
def test_killed_at_a_crash_point(point: str, victim: int, run: Run, tmp_path: Path) -> None:
    """The step before stands, or the step itself, whole, on all ranks; and the next job finds nothing in its way."""
    first = ended_well(run(steps=2))
    killed = {"crash_point": point, "crash_skip": 0, **LEFT_ALONE}
    told = run(*[killed if rank == victim else LEFT_ALONE for rank in range(2)], first=2, steps=1)
    assert told[victim].ended.returncode == -signal.SIGKILL, told[victim].ended.stderr
    again = ended_well(run(first=5, steps=1))
    found = int(again[0].found[0][0])
    assert again[0].found == again[1].found and found in (1, 2)
    if found == 1:
        assert again[0].found[0][1] == first[0].durable[1]
    assert not any(2 in rank.durable and found != 2 for rank in told), "called durable, and not there"
    assert_whole(tmp_path, found)
    assert_whole(tmp_path, 5)
    left = [path for path in (tmp_path / "steps").rglob("*") if ".tmp-" in path.name]
    assert not left, "a crash has left something"


AGAIN_POINTS = ["metadata-renamed", "manifest-renamed", "metadata-copy-written"]
MORE_AGAIN = [point for point in ("prepared", *METADATA_POINTS, "manifest-written", *COPY_POINTS) if point not in AGAIN_POINTS]


@pytest.mark.parametrize("point", [*AGAIN_POINTS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_AGAIN)])
def test_killed_while_a_step_is_saved_again(point: str, run: Run, tmp_path: Path) -> None:
    """For torch the step is one or the other, and for us the same, as soon as somebody saves."""
    first = ended_well(run(steps=2))
    told = run({"crash_point": point, **LEFT_ALONE}, LEFT_ALONE, first=1, steps=1)
    assert told[0].ended.returncode == -signal.SIGKILL, told[0].ended.stderr
    between = ended_well(run(first=5, steps=0))
    assert between[0].found == between[1].found and between[0].found[0][0] == "1"
    if point in ("prepared", *METADATA_POINTS, "manifest-written"):
        assert between[0].found[0][1] == first[0].durable[1]
    again = ended_well(run(first=5, steps=1))
    assert_whole(tmp_path, 1)
    folder = step_directory(tmp_path, 1)
    named = [file["name"] for file in json.loads((folder / "manifest.json").read_text())["files"]]
    (metadata,) = [name for name in named if name.startswith(".metadata")]
    assert (folder / ".metadata").read_bytes() == (folder / metadata).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted({*named, ".metadata", "manifest.json"})
    assert [*again[0].durable] == [5]
