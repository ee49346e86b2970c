"""What `python -m ckpt drain` says to a person."""

from __future__ import annotations

from pathlib import Path

import pytest
from node_roots import Job, drain_once

from ckpt.directory.step_names import step_name


def test_what_has_come_home_is_said(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    job.save(1200)
    words = [drain_once(job.roots[node]).stdout for node in (0, 1, 0, 0)]
    at_home = f"step 1200 is at '{job.home / step_name(1200)}'\n"
    assert words[0] == "step 1200 is delivered as far as it lies here, and waits for the drains of other nodes\n"
    assert words[1:3] == [at_home, at_home]
    assert words[3] == f"nothing that lies in '{job.roots[0]}' is left to be carried home\n"


def test_a_full_disk_for_its_words_is_no_obstacle(tmp_path: Path) -> None:
    """The log of a drain that a job has started lies on the node."""
    job = Job(tmp_path)
    job.save(1)
    assert "Traceback" not in drain_once(job.roots[0], prepare="sys.stdout = open('/dev/full', 'w')").stderr
    assert job.state(1) == "committed"


def test_what_has_failed_is_not_called_done(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1)
    (job.home / ".run").rename(job.home / ".away")
    ended = drain_once(job.roots[0])
    assert (ended.returncode, ended.stdout) == (5, "")


def test_the_directory_of_a_tier_is_explained(tmp_path: Path) -> None:
    """It holds the runs of several jobs."""
    job, other = Job(tmp_path), tmp_path / "other"
    job.save(7)
    (job.roots[0].parent / "no-run").mkdir()
    other.mkdir()
    empty = Job(other)
    empty.roots[0].rename(job.roots[0].with_name("run-2"))
    ended = drain_once(job.roots[0].parent)
    assert ended.returncode == 3 and "give the directory of one of them" in ended.stderr
    assert f"\n  '{job.roots[0]}', of '{job.home}': newest step 7\n" in ended.stderr
    assert f"\n  '{job.roots[0].with_name('run-2')}', of '{empty.home}': nothing complete\n" in ended.stderr
    assert "no-run" not in ended.stderr and job.steps_at_home() == []


@pytest.mark.parametrize("rate", ["fast", "0", "200 M b/s", "-5", "", "1e9"])
def test_what_is_no_rate_is_told_what_is_one(rate: str, tmp_path: Path) -> None:
    ended = drain_once(tmp_path, f"--rate={rate}")
    assert ended.returncode == 2 and f"{rate!r} is no rate" in ended.stderr and "200MB/s" in ended.stderr
