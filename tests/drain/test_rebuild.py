"""Home was removed while the nodes are intact: a drain that is told so brings it back, and no other one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from node_roots import RUN, TRIES_SOON, Drain, Job, MiB, drain_once, drain_well, wait_for


def drain_all(job: Job, *arguments: str) -> None:
    for root in (*job.roots, *job.roots[:-1]):
        drain_well(root, *arguments)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_newest_comes_there_again(nodes: int, tmp_path: Path) -> None:
    job = Job(tmp_path, nodes)
    for step in (1, 2):
        job.save(step, common=4 * MiB)
        drain_all(job)
    shutil.rmtree(job.home)
    ended = drain_once(job.roots[0])
    assert not job.home.exists(), "it may not be mounted"
    drain_all(job, "--rebuild")
    assert json.loads((job.home / ".run").read_text()) == {"run": RUN}
    assert job.steps_at_home() == [2], ended.stderr
    job.assert_home_is_right()
    job.assert_home_is_tidy()
    drain_all(job, "--rebuild")
    assert job.steps_at_home() == [2], "it does no harm where nothing is lost"
    job.assert_home_is_tidy()


def test_what_has_not_been_there_says_how_it_comes(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1)
    shutil.rmtree(job.home)
    ended = drain_once(job.roots[0])
    assert ended.returncode == 5 and "is the file system mounted?" in ended.stderr and "--rebuild" in ended.stderr


def test_a_drain_that_waits_for_home_is_no_obstacle(tmp_path: Path) -> None:
    """It goes on as soon as home is there, and ends."""
    job = Job(tmp_path)
    job.save(1)
    drain_well(job.roots[0])
    shutil.rmtree(job.home)
    job.save(2)
    with Drain(job.roots[0], [], TRIES_SOON) as waiting:
        wait_for(lambda: job.state(2) == "failed", waiting)
        drain_well(job.roots[0], "--rebuild")
        assert waiting.wait().returncode == 0
    assert 2 in job.steps_at_home()
    job.assert_home_is_right()


def test_the_home_of_another_run_stays_that(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1)
    (job.home / ".run").write_text('{"run": "another"}')
    ended = drain_once(job.roots[0], "--rebuild")
    assert ended.returncode == 1 and "is the home of the run another" in ended.stderr
    assert [path.name for path in job.home.iterdir()] == [".run"]
