"""A drain is killed with SIGKILL, at every named crash point and at any moment: nothing at home is torn, the next goes on."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from drain_points import DRAIN_POINTS
from node_roots import RUN, Drain, Job, MiB, crash_at, drain_once, drain_well, fault

from ckpt.directory.in_flight import FilesInFlight
from ckpt.directory.keeping import Keeping
from ckpt.directory.retention import Retention
from ckpt.directory.step_names import step_name

pytestmark = pytest.mark.usefixtures("native")

PUBLISH_POINTS = ("manifest-written", "manifest-renamed", "latest-written", "latest-renamed", "removal-begun")
COMMIT_MOMENTS = ("drain-plan-written", "drain-placed", "drain-all-placed", *PUBLISH_POINTS[:4], "drain-published")


NOTES_EACH_CHUNK = "from ckpt.drain import copying; copying._NOTE_EVERY_BYTES = 1"


def drain_all(job: Job) -> None:
    for root in [*job.roots, *job.roots[:-1]]:  # once more: the last of them has committed
        drain_well(root)


def begin(base: Path, nodes: int) -> Job:
    job = Job(base, nodes, home_keep=2)
    for step in (1, 2):
        job.save(step, size=MiB, common=3 * MiB if nodes > 1 else 0)
        drain_all(job)
    return job


def kill_at(job: Job, node: int, point: str, skip: int = 0, prepare: str = "pass") -> None:
    ended = drain_once(job.roots[node], prepare=f"{NOTES_EACH_CHUNK}; {prepare}; {crash_at(point, skip)}")
    assert ended.returncode == -signal.SIGKILL, f"it never came to {point}: {ended.stderr}"
    job.assert_home_is_right()
    assert max(job.steps_at_home()) >= 2, "what was at home is there"


def end_well(job: Job, newest: int) -> None:
    drain_all(job)
    assert {job.state(newest, node) for node in range(len(job.roots))} == {"committed"}
    job.assert_home_is_right()
    job.assert_home_is_tidy()


AGAIN = [(point, 1) for point in DRAIN_POINTS if point.startswith("journal") or point == "drain-chunk"]


@pytest.mark.parametrize(("point", "skip"), [*((point, 0) for point in (*DRAIN_POINTS, *PUBLISH_POINTS)), *AGAIN])
def test_killed_at_a_crash_point(point: str, skip: int, tmp_path: Path) -> None:
    job = begin(tmp_path, 1)
    job.save(3, size=24 * MiB if point in ("drain-noted", "drain-chunk") else MiB)
    kill_at(job, 0, point, skip)
    end_well(job, 3)
    assert job.steps_at_home() == [2, 3] and job.steps_on() == [2, 3]


@pytest.mark.parametrize("point", COMMIT_MOMENTS)
def test_killed_while_a_step_is_replaced(point: str, tmp_path: Path) -> None:
    job = begin(tmp_path, 1)
    job.save(2, size=MiB)
    kill_at(job, 0, point)
    end_well(job, 3)
    assert job.steps_at_home() == [1, 2]
    assert [path.name for path in (job.home / step_name(2)).glob("rank*")] == ["rank-00000-2.pt"]


@pytest.mark.parametrize("point", COMMIT_MOMENTS)
def test_all_drains_are_killed_during_the_commit(point: str, tmp_path: Path) -> None:
    job = begin(tmp_path, 2)
    job.save(3, size=MiB, common=3 * MiB)
    drain_well(job.roots[0])
    kill_at(job, 1, point)
    if not (job.home / step_name(3) / "manifest.json").exists():  # else that is all that is left to be done
        kill_at(job, 0, point)
    end_well(job, 3)
    assert job.steps_at_home() == [2, 3]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("point", ["drain-placed", "drain-all-placed", "manifest-written"])
def test_a_job_cleans_home_between_an_end_and_the_next_start(point: str, links: bool, tmp_path: Path) -> None:
    """It takes a step directory without a manifest for what a save of its own has left."""
    job = begin(tmp_path, 2)
    job.save(3, size=MiB, common=3 * MiB)
    no_links = "pass" if links else fault("link", errno.EPERM)
    assert drain_once(job.roots[0], prepare=no_links).returncode == 0
    kill_at(job, 1, point, prepare=no_links)
    Retention(job.home, FilesInFlight(), Keeping(), False, 1, print, print).remove_leftovers()
    assert not (job.home / step_name(3)).exists()
    for root in (*job.roots, *job.roots):
        assert drain_once(root, prepare=no_links).returncode == 0
    end_well(job, 3)
    assert job.steps_at_home() == [2, 3]


@pytest.mark.parametrize("point", ["drain-placed", "drain-all-placed", "manifest-renamed", "drain-published"])
def test_killed_where_there_are_no_links(point: str, tmp_path: Path) -> None:
    job = begin(tmp_path, 1)
    job.save(3, size=MiB)
    no_links = fault("link", errno.EPERM)
    kill_at(job, 0, point, prepare=no_links)
    assert drain_once(job.roots[0], prepare=no_links).returncode == 0
    end_well(job, 3)


def test_what_a_killed_one_has_noted_is_checked_as_a_whole(tmp_path: Path) -> None:
    """A journal that is wrong costs a second pass, and puts no good file aside."""
    job = begin(tmp_path, 1)
    job.save(3, size=24 * MiB)
    kill_at(job, 0, "drain-noted")
    journal = job.journal(3)
    assert journal is not None and journal.files["rank-00000.pt"].done > 0
    journal.files["rank-00000.pt"].crc32 ^= 1
    journal.write()
    end_well(job, 3)


@pytest.mark.parametrize("kills", [15, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("nodes", [1, 2])
def test_killed_at_any_moment(nodes: int, kills: int, tmp_path: Path) -> None:
    """Some end before; so there are more rounds than kills. How long one takes depends on what else the machine does."""
    moments = random.Random(20261129 + nodes)
    job, newest_step, killed, rounds = Job(tmp_path, nodes, home_keep=3), 0, 0, 0
    job.save(newest_step, size=MiB, common=5 * MiB)
    began = time.monotonic()
    drain_all(job)
    longest_s = max(0.08, (time.monotonic() - began) / len([*job.roots, *job.roots[:-1]]))
    newest_seen = first = job.sequence
    while killed < kills or newest_seen == first:
        rounds += 1
        assert rounds < 20 * kills, "drains are killed, and in spite of it something comes home"
        if moments.random() < 0.7:
            newest_step += moments.random() < 0.7
            job.save(newest_step, size=moments.randrange(3 * MiB), common=moments.choice([0, 5 * MiB]))
        drains = [Drain(root, ["--once"]) for root in job.roots]
        for drain in drains:
            ended = drain.kill_after(moments.uniform(0.0, longest_s))
            assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
            killed += ended.returncode != 0
        job.assert_home_is_right()
        found = max((manifest.sequence for manifest in job.manifests_at_home().values()), default=0)
        assert found >= newest_seen, "nothing newer is taken back"
        newest_seen = found
        job.forget_old()
    end_well(job, job.sequence)


@pytest.mark.parametrize("point", ["drain-chunk", "drain-all-copied", "drain-delivered"])
def test_an_inbox_that_was_removed_and_made_again_is_another(point: str, tmp_path: Path) -> None:
    """What one node has noted of the first is not taken for what lies in the second, though a file of that name is as long."""
    job = begin(tmp_path, 2)
    job.save(3, size=MiB, common=20 * MiB)
    kill_at(job, 0, point)
    shutil.rmtree(job.home / ".drain" / RUN / f"{3:012d}")
    drain_well(job.roots[1])
    end_well(job, 3)
    assert job.steps_at_home() == [2, 3]
