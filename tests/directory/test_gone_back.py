"""What a job has gone back to, as those find it who remove checkpoints: other jobs, drains, `ckpt prune`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_roots import Job, drain_well
from places import PYTHONPATH
from test_going_back import damage, make, save

import ckpt
from ckpt.directory import holds
from ckpt.directory import manifest as manifests
from ckpt.directory.going_back import GoingBack, sequences_at
from ckpt.directory.holds import Holds
from ckpt.directory.in_flight import FilesInFlight
from ckpt.directory.keeping import Keeping
from ckpt.directory.retention import Retention
from ckpt.drain import node as nodes
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.upkeep.pruning import KEPT, REMOVED, choose

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With the steps 1 to 5, whose sequences are the same; drains may tidy it."""
    with make(tmp_path / "run", keep=None) as checkpointer:
        save(checkpointer, *range(1, 6))
    (tmp_path / "run" / ".run").write_text(json.dumps({"run": "run-1"}))
    return tmp_path / "run"


def sequence_of(home: Path, step: int) -> int:
    return int(json.loads((home / f"step-{step:012d}" / "manifest.json").read_bytes())["sequence"])


def places(home: Path) -> list[Path]:
    return sorted(home.glob(".remote/*"))


def fate_of(home: Path, step: int) -> tuple[str, str]:
    return next((choice.fate, choice.why) for choice in choose(home, Keeping(1)) if choice.step == step)


def test_each_job_takes_back_its_own(home: Path) -> None:
    """An evaluation that goes back to the same step, and ends."""
    with make(home, keep=1) as training:
        training.restore(step=2)
        (place,) = places(home)
        with make(home) as evaluation:
            evaluation.restore(step=2)
            evaluation.restore(step=3)
            assert sequences_at(home) == {sequence_of(home, 2), sequence_of(home, 3)} and len(places(home)) == 2
        assert places(home) == [place] and sequences_at(home) == {sequence_of(home, 2)}
        assert fate_of(home, 2) == (KEPT, "a job has gone back to it") and fate_of(home, 3)[0] == REMOVED
        save(training, 6)
        assert training.steps() == [2, 6]
        assert holds.read(place) == Holds(*[(sequence_of(home, 2),)] * 2), "so that drains of before leave it alone"
    assert places(home) == [] and fate_of(home, 2)[0] == REMOVED


def test_another_job_that_saves_leaves_it(home: Path) -> None:
    """It claims home, and removes only what nobody holds."""
    with make(home) as evaluation:
        evaluation.restore(step=2)
        with make(home, keep=1) as training:
            training.restore()
            save(training, 6)
            assert training.steps() == [2, 6]
        assert len(places(home)) == 1
        evaluation.close()
        with make(home, keep=1) as training:
            training.restore()
            save(training, 7)
            assert training.steps() == [7]


def tidy(home: Path) -> None:
    """As a drain does that has brought the newest, and is told to keep that."""
    step = home / "step-000000000005"
    Retention(home, FilesInFlight(), Keeping(1), True, 1, print, print).tidy(step, manifests.read(step), None)


@pytest.fixture
def going_back(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has gone back to step 2, and lives."""
    program = f"import ckpt, sys; made = ckpt.Checkpointer({str(home)!r}); made.restore(step=2); print('!', flush=True)"
    command = [sys.executable, "-c", f"{program}; sys.stdin.read()"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None and child.stdout.readline() == b"!\n"
        yield child
        child.kill()


def test_what_a_killed_job_had_gone_back_to_stays_for_a_second_attempt(home: Path, going_back: subprocess.Popen[bytes]) -> None:
    """The job that saves next has made its own choice; nor does it stay for who prunes by hand."""
    assert fate_of(home, 2)[0] == KEPT
    going_back.kill()
    going_back.wait()
    assert len(places(home)) == 1 and sequences_at(home) == {sequence_of(home, 2)} and fate_of(home, 2)[0] == REMOVED
    tidy(home)
    with make(home, keep=1) as training:
        assert training.steps() == [2, 5]
        training.restore()
        save(training, 6)
        assert training.steps() == [6] and places(home) == []


def test_an_evaluation_that_is_killed_beside_a_job_that_saves_holds_nothing(home: Path, request: pytest.FixtureRequest) -> None:
    with make(home, keep=None) as training:
        training.restore()
        save(training, 6)
        evaluation = request.getfixturevalue("going_back")
        assert sequences_at(home) == {sequence_of(home, 2)}
        evaluation.kill()
        evaluation.wait()
        assert len(places(home)) == 1 and sequences_at(home) == set()


def test_nothing_is_held_of_what_could_not_be_restored(home: Path) -> None:
    damage(home, 4)
    with make(home) as checkpointer:
        with pytest.raises(ckpt.CorruptError):
            checkpointer.restore(step=4)
        with pytest.raises(ckpt.NotACheckpointError):
            checkpointer.restore(step=9)
        assert places(home) == []
        checkpointer.restore(step=2)
        assert sequences_at(home) == {sequence_of(home, 2)}


def test_where_no_drain_works_nothing_is_written(home: Path) -> None:
    (home / ".run").unlink()
    before = {path.name for path in home.iterdir()}
    with make(home, keep=1) as checkpointer:
        checkpointer.restore(step=2)
        assert {path.name for path in home.iterdir()} == before
        save(checkpointer, 6)
        assert checkpointer.steps() == [2, 6]


def test_drains_that_come_later_find_it(home: Path, tmp_path: Path) -> None:
    """The directory was none to which anything is carried, until this job."""
    (home / ".run").unlink()
    with make(home, tiers=[ckpt.Tier.node(tmp_path / "node")]) as checkpointer:
        checkpointer.restore(step=2)
        assert sequences_at(home) == {sequence_of(home, 2)}


def test_without_locks_it_counts_until_a_job_comes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with make(home) as evaluation:
        evaluation.restore(step=2)
        assert fate_of(home, 2)[0] == KEPT
        own = GoingBack(home)
        own.try_commit(sequence_of(home, 3))
        own.begin()
        assert sequences_at(home) == {sequence_of(home, 3)}
        own.release()


def test_what_could_not_be_noted_is_noted_next_time(home: Path) -> None:
    """The disk was full. What was noted before counts meanwhile."""
    back, first, second = GoingBack(home), sequence_of(home, 2), sequence_of(home, 3)
    back.try_commit(first)
    with pytest.MonkeyPatch.context() as patched:

        def refuse(path: Path, content: bytes) -> None:
            raise ckpt.StorageError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        patched.setattr("ckpt.storage.durable.replace_quickly", refuse)
        back.try_commit(second)
        assert sequences_at(home) == {first}
    back.begin()
    assert sequences_at(home) == {first, second}
    back.release()
    assert places(home) == []


def test_nothing_is_left_where_removed_files_stay_as_long_as_they_are_open(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: the directory is not empty until the lock is closed."""
    rmdir = Path.rmdir

    def refuse(path: Path) -> None:
        if any(os.readlink(f"/proc/self/fd/{each}").startswith(f"{path}/") for each in open_descriptors()):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", refuse)
    back = GoingBack(home)
    back.try_commit(sequence_of(home, 2))
    assert len(places(home)) == 1
    back.release()
    assert places(home) == []


def open_descriptors() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]


def test_an_empty_place_goes_with_the_next_job(home: Path) -> None:
    empty = home / ".remote" / "back-0123456789abcdef"
    empty.mkdir(parents=True)
    with make(home, keep=None, tiers=[]) as training:
        training.restore()
        save(training, 6)
    assert places(home) == []


def test_a_job_that_begins_just_then_takes_the_place_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no lock in it yet."""
    acquire, back = DirectoryLock.acquire, GoingBack(home)

    def begin_first(lock: DirectoryLock, timeout_s: float = 0.0) -> None:
        if (home / ".remote") in lock._path.parents and not taken:
            taken.extend(places(home))
            GoingBack(home).begin()
            assert places(home) == []
        acquire(lock, timeout_s)

    taken: list[Path] = []
    monkeypatch.setattr(DirectoryLock, "acquire", begin_first)
    back.try_commit(sequence_of(home, 2))
    assert places(home) == taken and sequences_at(home) == {sequence_of(home, 2)}
    back.release()
    assert places(home) == []


def test_a_drain_brings_it_home_and_leaves_it_there(tmp_path: Path) -> None:
    """Also what was not wanted there before. What node.json says of it does not matter."""
    job = Job(tmp_path, keep=10, home_keep=1)
    for step in range(1, 6):
        job.save(step)
    drain_well(job.roots[0])
    assert job.steps_at_home() == [5] and job.state(2) == "superseded"
    back, restoring = GoingBack(job.home), DirectoryLock(job.roots[0], name=nodes.RESTORING)
    restoring.acquire()
    back.try_commit(2)
    drain_well(job.roots[0])
    restoring.release()
    back.settle(2)
    assert job.steps_at_home() == [2, 5]
    job.save(6)
    drain_well(job.roots[0])
    assert job.steps_at_home() == [2, 6]
    back.release()
    job.save(7)
    drain_well(job.roots[0])
    assert job.steps_at_home() == [7]
    job.assert_home_is_right()


def test_a_drain_brings_again_what_home_has_tidied(tmp_path: Path) -> None:
    """And leaves it on the node until it is there. What is at home is not touched. It may begin after the restore."""

    def go_back(*sequences: int) -> None:
        for sequence in sequences:
            back.try_commit(sequence)
        drain_well(job.roots[0])

    job, back = Job(tmp_path, keep=3, home_keep=1), GoingBack(tmp_path / "home")
    for step in (1, 2, 3):
        job.save(step)
        drain_well(job.roots[0])
    assert job.steps_at_home() == [3] and [job.state(sequence) for sequence in (1, 2, 3)] == ["committed"] * 3
    job.save(4)
    there, noted = (job.home / "step-000000000003").stat().st_ino, job.journal(3)
    go_back(1, 3)
    assert job.steps_at_home() == [1, 3, 4] and job.steps_on() == [2, 3, 4]
    assert (job.home / "step-000000000003").stat().st_ino == there and job.journal(3) == noted
    go_back(2)
    assert job.steps_at_home() == [1, 2, 3, 4] and (job.home / "latest").read_text().strip() == "step-000000000004"
    back.release()
    job.assert_home_is_right()


def test_what_lies_on_the_node_no_more_is_not_brought(tmp_path: Path) -> None:
    """Nor tried: it was retired there, or saved again."""
    job, back = Job(tmp_path, keep=1, home_keep=1), GoingBack(tmp_path / "home")
    for step in (1, 2, 2):
        job.save(step)
        drain_well(job.roots[0])
    assert job.steps_on() == [2] and job.steps_at_home() == [2]
    before = [job.journal(sequence) for sequence in (1, 2, 3)]
    back.try_commit(1)
    back.try_commit(2)
    drain_well(job.roots[0])
    assert [job.journal(sequence) for sequence in (1, 2, 3)] == before
    back.release()


def test_a_job_of_before_has_told_its_drain(tmp_path: Path) -> None:
    """By node.json alone."""
    job = Job(tmp_path, keep=10, home_keep=1, home_keeps_too={"pinned": [2]})
    for step in range(1, 4):
        job.save(step)
    drain_well(job.roots[0])
    assert job.steps_at_home() == [2, 3]
