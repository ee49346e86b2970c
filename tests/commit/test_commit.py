"""Several ranks save together: real processes, killed, stopped, slow, with full disks, at every point of the protocol.

After all of it, what `latest` names is complete and the same on all ranks; who is left has an error that names the rank at
fault; and the next save works.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from background import Result, side_by_side
from dist import commit_worker
from nursery import Child, Ended, Nursery, nurseries_of_ranks
from support import stop, wait_until

from ckpt.metrics.events import read_events

MOST_RANKS = 3
# Where a rank can be killed while a step is saved; tests/crash compares these with the source.
ALL_RANKS = ["preallocated", "chunks-written", "data-durable", "before-rename", "renamed", "prepared"]
RANK_0_ONLY = [
    "shares-written",
    "manifest-written",
    "manifest-renamed",
    "latest-written",
    "latest-renamed",
    "published",
    "tidied",
    "removal-begun",
]

LANES = 6  # jobs of two ranks side by side: the one that is left waits for most of the time
IMPATIENT: dict[str, Any] = {"commit_timeout_s": commit_worker.SHORT_S}
LEFT_ALONE: dict[str, Any] = {"options": {"commit_timeout_s": 2 * commit_worker.SHORT_S}, "patience": 1}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(MOST_RANKS, optimizer=True) as made:
        yield made


class Told:
    """What one rank said."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended
        found = re.search(r"^found (-?\d+) (\S+) (-?\d+)$", ended.stdout, re.MULTILINE)
        self.found = (int(found[1]), found[2], int(found[3])) if found else None
        self.durable = [int(step) for step in re.findall(r"^durable (\d+)$", ended.stdout, re.MULTILINE)]
        self.wrote = [int(size) for size in re.findall(r"^wrote (\d+)$", ended.stdout, re.MULTILINE)]
        failed = re.findall(r"^failed (\d+) (\w+): (.*)$", ended.stdout, re.MULTILINE)
        self.failed = {int(step): (kind, text) for step, kind, text in failed}


def own_files(world: int) -> list[str]:
    return ["state.pt"] if world == 1 else [f"rank-{rank:05d}.pt" for rank in range(world)]


class Job:
    """All ranks of one run of a job."""

    def __init__(
        self, nurseries: list[Nursery], directory: Path, world: int, each: list[dict[str, Any]], **common: Any
    ) -> None:
        self.children: list[Child] = []
        for rank in range(world):
            request = {"directory": str(directory), "rank": rank, "world": world} | common | (each[rank] if each else {})
            program = f"from dist import commit_worker; commit_worker.main({request!r})"
            self.children.append(nurseries[rank].start(program))

    def end(self) -> list[Told]:
        return [Told(child.wait()) for child in self.children]


Start = Callable[..., Job]
Run = Callable[..., list[Told]]


@pytest.fixture
def start(nurseries: list[Nursery], tmp_path: Path) -> Start:
    return starter(nurseries, tmp_path)


def starter(nurseries: list[Nursery], directory: Path) -> Start:
    return lambda *each, world=2, **common: Job(nurseries, directory, world, list(each), **common)


@pytest.fixture
def run(start: Start) -> Run:
    return runner(start)


def runner(start: Start) -> Run:
    def run(*each: dict[str, Any], **common: Any) -> list[Told]:
        told = start(*each, **common).end()
        for rank in told:
            assert rank.ended.returncode == 0, rank.ended.stderr
        return told

    return run


EXPECTED: dict[int, str] = {}


def expected_digest(step: int) -> str:
    if not EXPECTED:
        torch.set_num_threads(1)  # as in the ranks: sums are rounded otherwise with more
        trainer = commit_worker.Trainer()
        for _ in range(40):
            trainer.advance()
            EXPECTED[trainer.step] = commit_worker.digest(trainer.state())
    return EXPECTED[step]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def committed(directory: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in directory.glob("step-*/manifest.json"))


def assert_whole(directory: Path, world: int, *told: Told) -> int:
    """Every committed step is whole and right, and what was called durable is there. Returns what `latest` names."""
    steps = committed(directory)
    for step in steps:
        folder = directory / f"step-{step:012d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["step"] == step and manifest["world_size"] == world
        kinds = [(file["kind"], file["rank"]) for file in manifest["files"]]
        assert sorted(kinds) == sorted([("replicated", 0), *(("rank", rank) for rank in range(world))])
        for file in manifest["files"]:
            state = torch.load(folder / file["name"])
            if file["kind"] == "replicated":
                assert commit_worker.digest(state) == expected_digest(step)
            else:
                assert commit_worker.digest(state) == commit_worker.digest(commit_worker.own_state(file["rank"], step))
    for rank in told:
        assert set(rank.durable) <= set(steps), "called durable, and not there"
    if not (directory / "latest").exists():
        assert len(steps) <= 1, "rank 0 may have been killed between the first manifest and latest"
        return -1
    return int((directory / "latest").read_text().removeprefix("step-"))


def assert_goes_on(run: Run, directory: Path, at_least: int) -> None:
    """New processes resume from the same step on all ranks, save, and find nothing in their way."""
    told = run(steps=2)
    found = told[0].found
    assert found is not None and found[0] >= at_least
    assert all(rank.found == found for rank in told), "all ranks resume from the same step"
    assert found == ((found[0], expected_digest(found[0]), found[0]) if found[0] >= 0 else (-1, "-", -1))
    for rank in told:
        assert rank.durable == [found[0] + 1, found[0] + 2] and not rank.failed
    assert assert_whole(directory, 2, *told) == found[0] + 2
    leftovers = [path for path in directory.rglob("*") if ".tmp-" in path.name]
    assert not leftovers, "a crash has left something"


# ---- when all goes well ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("wait", [True, False], ids=["one at a time", "several in flight"])
@pytest.mark.parametrize("writers", ["all", "rank0"])
def test_ranks_save_and_resume_together(world: int, wait: bool, writers: str, run: Run, tmp_path: Path) -> None:
    first = run(world=world, steps=6, wait=wait, options={"replicated_writers": writers})
    assert [rank.durable for rank in first] == [[0, 1, 2, 3, 4, 5]] * world
    assert assert_whole(tmp_path, world, *first) == 5
    folder = tmp_path / "step-000000000005"
    file, own = (folder / "replicated.pt").stat().st_size, [(folder / name).stat().st_size for name in own_files(world)]
    shares = [rank.wrote[-1] - size for rank, size in zip(first, own, strict=True)]
    if writers == "all" and world > 1:
        assert 0 < file - sum(shares) < file / 10, "what is left is the directory, which rank 0 writes"
        assert max(shares) - min(shares) <= 2 << 16, "each rank has written as much as any other, but for a chunk"
    else:
        assert shares == [file] + [0] * (world - 1)
    second = run(world=world, steps=1)
    assert [rank.found for rank in second] == [(5, expected_digest(5), 5)] * world


def test_only_what_is_kept_stays(run: Run, tmp_path: Path) -> None:
    told = run(steps=5, keep=2, wait=False)
    assert committed(tmp_path) == [3, 4]
    assert [rank.durable for rank in told] == [[0, 1, 2, 3, 4]] * 2


def test_a_step_is_saved_again(run: Run, tmp_path: Path) -> None:
    told = run(steps=3, wait=False, plan={"1": {"twice": True}})
    assert not any(rank.failed for rank in told) and assert_whole(tmp_path, 2) == 2
    files = sorted(path.name for path in (tmp_path / "step-000000000001").iterdir())
    assert files == ["manifest.json", "rank-00000-2.pt", "rank-00001-2.pt", "replicated-2.pt"], "the old files are gone"
    assert_goes_on(run, tmp_path, 2)


def test_ranks_go_back_to_a_step(run: Run, tmp_path: Path) -> None:
    run(steps=4)
    told = run(steps=1, keep=1, at=1)
    assert [rank.found for rank in told] == [(1, expected_digest(1), 1)] * 2
    assert assert_whole(tmp_path, 2, *told) == 2 and committed(tmp_path) == [1, 2], "what they went back to, and the newest"
    told = run({"at": 2}, {"at": 1}, steps=1)
    assert "refused PeerError: " in told[0].ended.stdout and "asks for step 1" in told[0].ended.stdout
    assert "refused CheckpointError: " in told[1].ended.stdout
    told = run(steps=1, at=7)
    for rank in told:
        assert "refused NotACheckpointError: there is no checkpoint of step 7" in rank.ended.stdout
        assert "those of steps 1, 2" in rank.ended.stdout
    assert [rank.found for rank in run(steps=1)] == [(2, expected_digest(2), 2)] * 2


def test_a_slow_rank_is_waited_for(run: Run, tmp_path: Path) -> None:
    slow = {"plan": {"1": {"fault": {"call": "fdatasync", "delay_s": 0.7}}}}
    told = run({}, slow, steps=3, options={"events": "all"})
    assert [rank.durable for rank in told] == [[0, 1, 2]] * 2
    assert assert_whole(tmp_path, 2, *told) == 2
    assert [who_was_slowest(tmp_path, step) for step in range(3)][1] == 1


def who_was_slowest(directory: Path, step: int) -> int:
    """As the events of both ranks say it."""
    found = [event for event in read_events(directory) if event["event"] == "save" and event["step"] == step]
    first, second = sorted(found, key=lambda event: int(event["rank"]))
    assert (first["rank"], second["rank"]) == (0, 1) and first["sequence"] == second["sequence"] == step + 1
    slowest = int(second["flushed_s"] > first["flushed_s"])
    assert first["slowest_rank"] == second["slowest_rank"] == slowest and first["world_size"] == 2
    manifest = json.loads((directory / f"step-{step:012d}" / "manifest.json").read_text())
    assert manifest["cost"]["flushed_s"] == pytest.approx(max(first["flushed_s"], second["flushed_s"]), abs=1e-5)
    total = sum(file["bytes"] for file in manifest["files"])
    assert first["all_ranks"] == second["all_ranks"] == {"bytes_total": total, **manifest["cost"]}
    assert first["bytes_total"] < total
    return slowest


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2), (3, 2)])
def test_a_job_resumes_with_another_number_of_ranks(before: int, after: int, run: Run) -> None:
    run(world=before, steps=2)
    told = run(world=after, steps=1)
    assert [rank.found for rank in told] == [(1, expected_digest(1), 1)] * after
    assert [rank.durable for rank in told] == [[2]] * after


# ---- when a rank fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("call", ["open", "fallocate", "pwritev", "fdatasync", "rename"])
def test_a_full_disk_on_one_rank(call: str, rank: int, run: Run, tmp_path: Path) -> None:
    bad = {"plan": {"1": {"fault": {"call": call, "path_part": f"rank-{rank:05d}", "error": 28}}}}
    told = run(*[bad if each == rank else {} for each in range(2)], steps=4)
    assert [each.durable for each in told] == [[0, 2, 3]] * 2
    kind, text = told[rank].failed[1]
    assert kind == "StorageError" and "No space left" in text
    kind, text = told[1 - rank].failed[1]
    assert kind == "PeerError" and f"rank {rank}" in text and "No space left" in text
    assert assert_whole(tmp_path, 2, *told) == 3


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("call", ["open", "fallocate", "pwritev", "fdatasync"])
def test_a_share_that_cannot_be_written(call: str, rank: int, run: Run, tmp_path: Path) -> None:
    bad = {"plan": {"1": {"fault": {"call": call, "path_part": "replicated", "error": 5, "count": 1}}}}
    told = run(*[bad if each == rank else {} for each in range(2)], steps=3)
    assert [each.durable for each in told] == [[0, 2]] * 2
    assert told[rank].failed[1][0] == "StorageError"
    assert f"rank {rank}" in told[1 - rank].failed[1][1] and "Input/output error" in told[1 - rank].failed[1][1]
    assert assert_whole(tmp_path, 2, *told) == 2
    assert list((tmp_path / "step-000000000001").iterdir()) == [], "nobody has left a file behind"


@pytest.mark.parametrize("call", ["write", "ftruncate", "rename"])
def test_rank_0_cannot_join_the_shares(call: str, run: Run, tmp_path: Path) -> None:
    told = run({"plan": {"1": {"fault": {"call": call, "path_part": "replicated", "error": 28}}}}, {}, steps=3)
    assert [each.durable for each in told] == [[0, 2]] * 2
    assert told[0].failed[1][0] == "StorageError" and "No space left" in told[1].failed[1][1]
    assert assert_whole(tmp_path, 2, *told) == 2
    assert list((tmp_path / "step-000000000001").iterdir()) == [], "nobody has left a file behind"


def test_ranks_that_disagree_about_what_is_lazy(run: Run, tmp_path: Path) -> None:
    """Then the shares would not fit together."""
    told = run({}, {"plan": {"2": {"lazy": False}}}, steps=4)
    assert [each.durable for each in told] == [[0, 1, 3]] * 2
    for each in told:
        assert "sizes or the layout" in each.failed[2][1]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_rank_0_cannot_publish(call: str, run: Run, tmp_path: Path) -> None:
    bad = {"plan": {"1": {"fault": {"call": call, "path_part": "manifest.json", "error": 5}}}}
    told = run(bad, {}, steps=3)
    assert [each.durable for each in told] == [[0, 2]] * 2
    assert told[0].failed[1][0] == "StorageError" and "Input/output error" in told[1].failed[1][1]
    assert assert_whole(tmp_path, 2, *told) == 2
    assert list((tmp_path / "step-000000000001").iterdir()) == [], "nobody has left a file behind"


def test_a_state_that_cannot_be_pickled_on_one_rank(run: Run, tmp_path: Path) -> None:
    told = run({}, {"plan": {"1": {"unpicklable": True}}}, steps=3)
    assert [each.durable for each in told] == [[0, 2]] * 2
    assert "lambda" in told[1].failed[1][1] and "rank 1" in told[0].failed[1][1] and "lambda" in told[0].failed[1][1]


def test_replicas_that_differ(run: Run, tmp_path: Path) -> None:
    told = run({"plan": {"1": {"differ": {"scale": 4096.0}}}}, {"plan": {"1": {"differ": {"scale": 8192.0}}}}, steps=3)
    assert [each.durable for each in told] == [[0, 2]] * 2
    for each in told:
        kind, text = each.failed[1]
        assert kind == "PeerError" and "not the same on all ranks" in text
        assert "'scale'" in text and "8192.0 on rank 1, 4096.0 on rank 0" in text
    assert assert_whole(tmp_path, 2, *told) == 2


def test_ranks_that_save_different_steps(run: Run, tmp_path: Path) -> None:
    told = run({}, {"plan": {"1": {"as_step": 7}}}, steps=3)
    assert [each.durable for each in told] == [[0, 2]] * 2
    assert all("rank 1 saves step 7 where rank 0 saves step 1" in each.failed[1][1] for each in told)


def test_a_rank_that_skips(run: Run, tmp_path: Path) -> None:
    slow = {"1": {"fault": {"call": "fdatasync", "delay_s": 0.5}}}
    options = {"when_busy": "skip", "max_in_flight": 1}
    told = run({"options": {"max_in_flight": 4}}, {"options": options, "plan": slow}, steps=4, wait=False)
    for each in told:
        assert set(each.durable) | set(each.failed) == {0, 1, 2, 3}
        assert {kind for kind, _ in each.failed.values()} == {"SkippedError"}
    assert told[0].durable == told[1].durable
    assert_whole(tmp_path, 2, *told)


def test_a_damaged_file_of_one_rank_sets_all_back(run: Run, tmp_path: Path) -> None:
    run(steps=3)
    path = tmp_path / "step-000000000002" / "rank-00001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    told = run(steps=1)
    assert [each.found for each in told] == [(1, expected_digest(1), 1)] * 2
    assert "CRC-32" in told[0].ended.stderr


# ---- when a rank dies or hangs ---------------------------------------------------------------------------------------


def assert_survived(told: Told, victim: int) -> None:
    """The other rank has heard of it, in words that name the rank, and has ended by itself."""
    assert told.ended.returncode == 0, told.ended.stderr
    assert told.failed, "it must have missed the other"
    assert all(kind == "PeerError" and f"rank {victim}" in text for kind, text in told.failed.values()), told.failed


GROUP_POINTS = [(point, victim) for point in ("data-durable", "prepared") for victim in (0, 1)]
GROUP_POINTS += [(point, 0) for point in ("shares-written", "manifest-renamed", "published")]


@pytest.fixture(scope="module")
def begun(
    nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Result]:
    expected_digest(0)  # once, before there are threads
    with contextlib.ExitStack() as stack:
        lanes = [[stack.enter_context(nursery.another()) for nursery in nurseries[:2]] for _ in range(LANES)]
        bodies = {
            "test_a_rank_is_killed_at_any_point": killed_at_a_point,
            "test_a_rank_of_a_process_group_is_killed": killed_at_a_point_with_a_process_group,
            "test_a_rank_is_killed_at_any_moment": killed_at_a_moment,
        }
        yield stack.enter_context(side_by_side(request, bodies, lanes, tmp_path_factory))


@pytest.mark.parametrize(("point", "victim"), [(p, v) for p in ALL_RANKS for v in (0, 1)] + [(p, 0) for p in RANK_0_ONLY])
def test_a_rank_is_killed_at_any_point(point: str, victim: int, begun: Result, request: pytest.FixtureRequest) -> None:
    begun(request)


@pytest.mark.parametrize(("point", "victim"), GROUP_POINTS)
def test_a_rank_of_a_process_group_is_killed(point: str, victim: int, begun: Result, request: pytest.FixtureRequest) -> None:
    """Which agrees by the store of torch.distributed, whose server dies with rank 0."""
    begun(request)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_rank_is_killed_at_any_moment(delay_s: float, victim: int, begun: Result, request: pytest.FixtureRequest) -> None:
    begun(request)


def killed_at_a_point(lane: list[Nursery], directory: Path, point: str, victim: int, **more: Any) -> None:
    start = starter(lane, directory)
    crashes = [{"crash_point": point if rank == victim else "", "crash_skip": 2} for rank in range(2)]
    told = start(*crashes, steps=7, **(more or {"keep": 2}), **LEFT_ALONE).end()
    assert told[victim].ended.returncode == -signal.SIGKILL
    assert_survived(told[1 - victim], victim)
    durable = max([-1, *told[0].durable, *told[1].durable])
    assert assert_whole(directory, 2) >= durable >= 0
    assert_goes_on(runner(start), directory, durable)


def killed_at_a_point_with_a_process_group(lane: list[Nursery], directory: Path, point: str, victim: int) -> None:
    killed_at_a_point(lane, directory, point, victim, coordinator="torch", port=free_port())


def killed_at_a_moment(lane: list[Nursery], directory: Path, delay_s: float, victim: int) -> None:
    start = starter(lane, directory)
    job = start(steps=38, wait=False, keep=3, **LEFT_ALONE)
    deadline = time.monotonic() + 30
    while not committed(directory) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay_s)
    os.kill(job.children[victim].pid, signal.SIGKILL)
    told = job.end()
    if told[victim].ended.returncode == -signal.SIGKILL and told[1 - victim].failed:
        assert_survived(told[1 - victim], victim)
    newest = max([-1, *told[0].durable, *told[1].durable])
    assert assert_whole(directory, 2) >= newest
    assert_goes_on(runner(start), directory, newest)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_for_a_while(victim: int, start: Start, run: Run, tmp_path: Path) -> None:
    """The others miss it and train on; when it comes back, saves work again."""
    slowly = {str(step): {"sleep_s": 0.25} for step in range(16)}
    job = start(steps=16, plan=slowly, options=IMPATIENT)
    wait_until(lambda: bool(committed(tmp_path)), what="the first checkpoint")
    stop(job.children[victim].pid)
    try:
        wait_until(lambda: "failed " in job.children[1 - victim].said(), what="a save that the other gives up")
    finally:
        os.kill(job.children[victim].pid, signal.SIGCONT)
    told = job.end()
    other = told[1 - victim]
    assert other.failed
    first = min(other.failed)
    assert f"rank {victim}" in other.failed[first][1], other.failed
    for each in told:
        assert each.ended.returncode == 0 and each.durable and each.durable[-1] > first, each.ended
    assert assert_whole(tmp_path, 2, *told) > first
