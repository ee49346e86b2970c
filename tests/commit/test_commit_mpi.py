"""Ranks that mpirun has started save together, and one is killed: Open MPI then ends all of them, wherever they are just then.

What `latest` names is complete and the same on all ranks; the next job resumes from it, saves, and finds nothing in its way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from choice import mostly_slow
from dist import commit_worker
from nursery import Ended
from places import PYTHONPATH
from support import patience
from test_commit import Told, assert_whole, committed, expected_digest

MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI", "PMIX", "PRTE")
DEADLINE_S = patience(60.0)
SHARED_MEMORY = ["--mca", "btl", "self,sm"]  # as Open MPI would choose by itself, after looking for networks for a second
SLACK_S = patience(3.0)  # by how much a deadline may be missed on a machine that is busy with other tests
IMPATIENT = {"commit_timeout_s": commit_worker.SHORT_S}

# Point, victim, how often it has passed the point before, and whether the step is a checkpoint then. In each job it saves one
# step, and dies in the next. Rank 0 gives a name to its own file and then to the one of all. A job takes seconds to start: here
# ranks die at points of each kind, in test_commit.py at all.
KILLS = [
    ("before-rename", 0, 2, "no"),
    ("renamed", 1, 1, "no"),
    ("prepared", 1, 1, "maybe"),  # rank 0 knows all and publishes, if there is time
    ("manifest-renamed", 0, 1, "yes"),
    ("latest-renamed", 0, 1, "yes"),
]
MORE_KILLS = [
    ("before-rename", 1, 1, "no"),
    ("renamed", 0, 3, "no"),
    ("prepared", 0, 1, "no"),
    ("shares-written", 0, 1, "no"),
    ("latest-written", 0, 1, "yes"),
    ("published", 0, 1, "yes"),
]

pytestmark = pytest.mark.usefixtures("native")
if importlib.util.find_spec("mpi4py") is None:
    pytest.skip("mpi4py is not installed", allow_module_level=True)
if MPIRUN is None:
    pytest.skip("there is no mpirun", allow_module_level=True)


# ---- jobs ------------------------------------------------------------------------------------------------------------


class Job:
    """Two ranks under mpirun, that save into `place`/saved. A context manager: whatever still runs at the end is killed.

    Args:
        recovery: when a rank dies, Open MPI lets the others live.
    """

    def __init__(self, place: Path, *each: dict[str, Any], recovery: bool = False, **common: Any) -> None:
        self._log = place / f"log-{len(list(place.glob('log-*-errors')))}"
        common = {"directory": str(place / "saved"), "world": 2} | common
        requests = [common | {"rank": rank} | (each[rank] if each else {}) for rank in range(2)]
        program = f"commit_worker.main_under_mpirun({requests!r}, {str(self._log)!r}, finalize={not recovery})"
        command = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", *SHARED_MEMORY]
        command += ["--enable-recovery"] if recovery else []
        command += ["-n", "2", sys.executable, "-c", f"from dist import commit_worker; {program}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        with open(f"{self._log}-errors", "wb") as errors:
            self._mpirun = subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: Any) -> None:
        left = [psutil.Process(self.pid(rank)) for rank in range(2) if self.is_running(rank)]
        if self._mpirun.poll() is None:
            left += [*psutil.Process(self._mpirun.pid).children(recursive=True), self._mpirun]
        for program in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                program.kill()
        self._mpirun.wait()

    def end(self) -> list[Told]:
        """Waits for mpirun to end by itself, which must leave no rank behind."""
        try:
            self._mpirun.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"mpirun does not end: {self.errors}")
        self.wait_until(lambda: not any(map(self.is_running, range(2))), "a rank has outlived mpirun", SLACK_S)
        return [Told(Ended(self._mpirun.returncode, self.said(rank), self.errors)) for rank in range(2)]

    @property
    def errors(self) -> str:
        """What mpirun and both ranks have said there."""
        return Path(f"{self._log}-errors").read_text()

    def said(self, rank: int) -> str:
        path = Path(f"{self._log}-{rank}")
        return path.read_text() if path.exists() else ""

    def pid(self, rank: int) -> int | None:
        """None before it has begun."""
        found = re.match(r"pid (\d+)\n", self.said(rank))
        return int(found[1]) if found else None

    def is_running(self, rank: int) -> bool:
        pid = self.pid(rank)
        with contextlib.suppress(psutil.NoSuchProcess):
            return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return False

    def wait_until(self, done: Callable[[], bool], otherwise: str, deadline_s: float = DEADLINE_S) -> float:
        """Returns how long it took, seconds."""
        started = time.monotonic()
        while not done():
            assert time.monotonic() - started < deadline_s, f"{otherwise}: {self.errors}"
            time.sleep(0.002)
        return time.monotonic() - started


def has_ended(told: Told) -> bool:
    """The rank came to the end of its program."""
    return told.ended.stdout.endswith("ended\n")


def strays(directory: Path) -> set[tuple[Path, int]]:
    """Files that belong to no checkpoint, and when they were written: the next job may give others the same names."""
    wanted = {directory / "latest", directory / ".lock", directory / "events.jsonl"}
    for manifest in directory.glob("step-*/manifest.json"):
        wanted |= {manifest, *(manifest.with_name(file["name"]) for file in json.loads(manifest.read_text())["files"])}
    return {(path, path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file() and path not in wanted}


def latest(directory: Path) -> int:
    return int((directory / "latest").read_text().removeprefix("step-"))


# ---- Open MPI ends the job -------------------------------------------------------------------------------------------


class Training:
    """Resumed by job after job, each of which looks at what the one before has left: to start one takes seconds."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.directory = place / "saved"

    def go_on(self, *each: dict[str, Any], **common: Any) -> tuple[int, list[Told]]:
        """Runs the next job to its end, whatever that is. Returns the step that it resumed from; -1: none."""
        newest, left = max(committed(self.directory), default=-1), strays(self.directory)
        with Job(self._place, *each, coordinator="auto", keep=3, **common) as job:
            told = job.end()
        right = expected_digest(newest) if newest >= 0 else "-"
        assert [rank.found for rank in told] == [(newest, right, newest)] * 2, job.errors
        assert not (self.directory / ".coordination").exists(), "the ranks have agreed by files, not by MPI"
        assert not left & strays(self.directory), "the first save should have removed it"
        assert assert_whole(self.directory, 2, *told) >= newest + 1, "the first save of the job"
        return newest, told


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize(
    ("point", "victim", "passed", "committed_then"),
    mostly_slow([*KILLS, *MORE_KILLS], run=KILLS),
)
def test_a_rank_is_killed_and_mpirun_ends_the_job(
    point: str, victim: int, passed: int, committed_then: str, training: Training
) -> None:
    crash = {"crash_point": point, "crash_skip": passed}
    resumed, told = training.go_on(*[crash if rank == victim else {} for rank in range(2)], steps=9, wait=False)
    for rank in told:
        assert rank.ended.returncode != 0 and not has_ended(rank) and not rank.failed, rank.ended
    newest = committed(training.directory)[-1]
    assert newest - resumed in {"no": (1,), "yes": (2,), "maybe": (1, 2)}[committed_then]
    behind = point in ("manifest-renamed", "latest-written")
    assert latest(training.directory) == newest - behind


def test_the_training_that_was_killed_so_often_ends_well(training: Training) -> None:
    resumed, told = training.go_on(steps=2)
    for rank in told:
        assert rank.ended.returncode == 0 and has_ended(rank), rank.ended
        assert rank.durable == [resumed + 1, resumed + 2] and not rank.failed
    assert latest(training.directory) == resumed + 2
    assert not strays(training.directory)
    left = {path.name for path in training.directory.iterdir()}
    assert left <= {".lock", "events.jsonl", "latest", *(f"step-{resumed + number:012d}" for number in range(3))}


# ---- Open MPI lets the others live -----------------------------------------------------------------------------------


def miss_s(victim: int) -> float:
    """How long the other may wait for it, seconds. For the word of rank 0 that is longer than rank 0 itself may wait."""
    return (3 if victim == 0 else 1) * commit_worker.SHORT_S + SLACK_S


def assert_missed(told: Told, victim: int) -> None:
    assert told.failed, "it must have missed the other"
    assert all(kind == "PeerError" and f"rank {victim}" in text for kind, text in told.failed.values()), told.failed


@pytest.mark.slow
@pytest.mark.parametrize(("point", "victim"), [("prepared", 0), ("before-rename", 1)])
def test_a_rank_is_killed_and_the_other_trains_on(point: str, victim: int, tmp_path: Path) -> None:
    each = [{"crash_point": point, "crash_skip": 1} if rank == victim else {} for rank in range(2)]
    with Job(tmp_path, *each, coordinator="mpi", steps=3, options=IMPATIENT, recovery=True) as job:
        job.wait_until(lambda: job.pid(victim) is not None, "it has not begun")
        job.wait_until(lambda: not job.is_running(victim), "it never came to the crash point")
        job.wait_until(lambda: "failed" in job.said(1 - victim), "nobody misses it", miss_s(victim))
        told = job.end()
    assert not has_ended(told[victim]) and not told[victim].failed
    assert has_ended(told[1 - victim]), "it has trained on, to the end of its program"
    assert told[1 - victim].durable == [0] and [*told[1 - victim].failed] == [1, 2]
    assert_missed(told[1 - victim], victim)
    assert assert_whole(tmp_path / "saved", 2, *told) == 0


# ---- a rank hangs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_under_mpirun_hangs_for_a_while(victim: int, tmp_path: Path) -> None:
    """The other misses it and trains on; when it comes back, saves work again."""
    steps = 8
    slowly = {str(step): {"sleep_s": 0.1} for step in range(steps)}
    with Job(tmp_path, coordinator="mpi", steps=steps, plan=slowly, options=IMPATIENT) as job:
        job.wait_until(lambda: "durable" in job.said(victim), "nothing is saved")
        stopped = psutil.Process(job.pid(victim))
        stopped.suspend()
        stopped_s = job.wait_until(lambda: "failed" in job.said(1 - victim), "nobody misses it", miss_s(victim))
        time.sleep(max(0.0, commit_worker.SHORT_S - stopped_s))  # the other may have waited before
        stopped.resume()
        told = job.end()
    assert_missed(told[1 - victim], victim)
    for rank in told:
        assert rank.ended.returncode == 0 and has_ended(rank), rank.ended
        assert rank.durable[0] == 0 and rank.durable[-1] == steps - 1, rank.ended
    assert assert_whole(tmp_path / "saved", 2, *told) == steps - 1
