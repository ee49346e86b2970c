"""Home cannot be written to for a while, or not at all; a file on the node is damaged: what is at home stays right."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_roots import (
    TRIES_SOON,
    Drain,
    Job,
    MiB,
    drain_once,
    drain_well,
    fault,
    that_cannot_be_changed,
    this_process,
    wait_for,
)

from ckpt.directory.step_names import names_in, step_name

NAME = "rank-00000.pt"

CALLS = {
    "pwrite": "/.drain/",
    "fdatasync": "/.drain/",
    "fsync": "/home/",
    "open": "/.drain/",
    "mkdir": "/home/",
    "rename": "/home/",
    "link": "/home/",
    "write": "/home/",
    "ftruncate": "/.drain/",
    "pread": "/node0/",
}


def flip_a_bit(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_is_told_and_tried_again(call: str, code: int, tmp_path: Path, native: object) -> None:
    job = Job(tmp_path)
    job.save(1, size=MiB)
    drain_well(job.roots[0])
    job.save(2, size=MiB)
    for skip in (0, 1, 2):
        ended = drain_once(job.roots[0], prepare=fault(call, code, CALLS[call], skip=skip))
        job.assert_home_is_right()
        if ended.returncode == 0:  # there were not so many calls
            assert job.state(2) == "committed"
            continue
        assert "it is tried again" in ended.stderr or "was not carried home" in ended.stderr
        journal = job.journal(2)
        assert journal is not None and journal.state in ("failed", "copied")
    drain_well(job.roots[0])
    assert job.state(2) == "committed" and job.steps_at_home() == [1, 2]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_what_no_time_heals_waits_for_the_next_generation(code: int, tmp_path: Path, native: object) -> None:
    job = Job(tmp_path)
    job.save(1)
    ended = drain_once(job.roots[0], prepare=fault("open", code, "/.drain/run-1"))
    assert ended.returncode == 5 and "step 1 was not carried home" in ended.stderr
    journal = job.journal(1)
    assert journal is not None and (journal.state, journal.next, journal.errno) == ("failed", None, code)
    drain_well(job.roots[0])  # somebody has changed it, and says so by starting it anew
    assert job.state(1) == "committed"


def test_home_is_away_for_a_while(tmp_path: Path) -> None:
    """The backlog is bounded, nothing that is newest goes, and the newest comes home as soon as it can."""
    job = Job(tmp_path, pids=this_process())
    job.save(1)
    away = tmp_path / "away"
    with Drain(job.roots[0], [], TRIES_SOON) as drain:
        wait_for(lambda: job.state(1) == "committed", drain)
        job.home.rename(away)
        for step in range(2, 9):
            job.save(step)
            wait_for(lambda: job.state(job.sequence) in ("queued", "failed"), drain)
        wait_for(lambda: job.steps_on() == [7, 8], drain)
        assert not job.home.exists(), "what is not mounted is not written to"
        assert [job.state(sequence) for sequence in range(2, 7)] == ["superseded"] * 5
        # Who waits for the newest finds the cause in its journal.
        wait_for(lambda: (newest := job.journal(job.sequence)) is not None and newest.errno == errno.ENOENT, drain)
        away.rename(job.home)
        wait_for(lambda: job.state(8) == "committed", drain)
        wait_for(lambda: job.state(7) in ("superseded", "committed"), drain)
        assert drain.runs
    job.assert_home_is_right()
    job.assert_home_is_tidy()
    assert job.steps_at_home()[0] == 1 and job.steps_at_home()[-1] == 8


@pytest.fixture
def small_home(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("only root can mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_file_system_that_is_full(small_home: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, home=small_home, pids=this_process())
    filler = small_home / "filler"
    filler.write_bytes(bytes(6 * MiB))
    job.save(1, size=4 * MiB)
    with Drain(job.roots[0], [], TRIES_SOON) as drain:
        wait_for(lambda: job.state(1) == "failed", drain)
        journal = job.journal(1)
        assert journal is not None and journal.errno == errno.ENOSPC and journal.next is not None
        filler.unlink()
        wait_for(lambda: job.state(1) == "committed", drain)
    job.assert_home_is_right()


def test_the_home_of_another_run_is_left_alone(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1)
    (job.home / ".run").write_text('{"run": "another"}')
    ended = drain_once(job.roots[0])
    assert ended.returncode == 5 and "is the home of the run another" in ended.stderr
    assert names_in(job.home) == {".run"}


@pytest.mark.parametrize("at", [0, 9 * MiB, 12 * MiB - 1])
def test_a_damaged_file_is_put_aside(at: int, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1)
    drain_well(job.roots[0])
    job.save(2, size=12 * MiB)
    directory = job.roots[0] / step_name(2)
    flip_a_bit(directory / NAME, at)
    ended = drain_once(job.roots[0])
    assert ended.returncode == 5 and "it is damaged; it was put aside" in ended.stderr
    assert not (directory / NAME).exists() and (directory / f"{NAME}.damaged").stat().st_size == 12 * MiB
    journal = job.journal(2)
    assert journal is not None and (journal.state, journal.next) == ("failed", None) and "CRC-32" in journal.text
    assert job.steps_at_home() == [1] and drain_once(job.roots[0]).returncode == 5
    job.save(3)
    for _ in range(2):  # what has failed is of no more interest
        drain_well(job.roots[0])
    assert job.steps_at_home() == [1, 3]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_when_the_newest_is_damaged_the_one_before_comes_home(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    job.save(1, common=4 * MiB)
    job.save(2, common=4 * MiB)
    flip_a_bit(job.roots[1] / step_name(2) / "replicated.pt", 3)  # of which the other node delivers these bytes
    drain_well(job.roots[0])
    assert job.state(2, 0) == "copied"
    assert drain_once(job.roots[1]).returncode == 5
    assert (job.state(2, 1), job.state(1, 1)) == ("failed", "copied")
    for root in (job.roots[0], job.roots[0]):
        ended = drain_once(root)
        assert ended.returncode == 5 and "node 1" in ended.stderr and "it is damaged" in ended.stderr
    assert job.steps_at_home() == [1] and job.state(2, 0) == "failed"
    job.assert_home_is_right()
    job.save(3, common=4 * MiB)
    for root in (*job.roots, *job.roots):
        drain_once(root)
    assert [job.state(2, node) for node in (0, 1)] == ["superseded", "failed"], "what the other node can never deliver"
    assert job.steps_at_home() == [1, 3]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


@pytest.mark.parametrize("change", ["shorter", "longer", "gone", "a link", "a FIFO"])
def test_a_file_that_is_not_what_was_written(change: str, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1, size=MiB)
    path = job.roots[0] / step_name(1) / NAME
    content = path.read_bytes()
    path.unlink()
    if change == "shorter":
        path.write_bytes(content[:-1])
    elif change == "longer":
        path.write_bytes(content + b"x")
    elif change == "a link":
        path.symlink_to("/dev/zero")
    elif change == "a FIFO":
        subprocess.run(["mkfifo", str(path)], check=True)
    ended = drain_once(job.roots[0])
    assert ended.returncode == 5 and job.state(1) == "failed"
    assert job.steps_at_home() == [] and not (job.home / step_name(1)).exists()


def test_what_was_damaged_in_the_inbox_is_not_committed(tmp_path: Path) -> None:
    """Sizes are looked at again; bytes that were written are the file system's to keep."""
    job = Job(tmp_path, nodes=2)
    job.save(1, size=MiB, common=4 * MiB)
    drain_well(job.roots[0])
    inbox = job.home / ".drain" / "run-1" / f"{1:012d}"
    with (inbox / NAME).open("r+b") as file:
        file.truncate(1000)
    drain_well(job.roots[1])
    assert job.steps_at_home() == [] and job.state(1, 1) == "copied"
    for root in (*job.roots, *job.roots):
        drain_well(root)
    assert job.steps_at_home() == [1]
    job.assert_home_is_right()


def test_a_removal_that_fails_is_no_failure(tmp_path: Path, native: object) -> None:
    job = Job(tmp_path, keep=1)
    job.save(1)
    drain_well(job.roots[0])
    job.save(2)
    ended = drain_once(job.roots[0], prepare=fault("unlink", errno.EIO, "/node0/"))
    assert ended.returncode == 0 and "all checkpoints are good" in ended.stderr
    assert job.state(2) == "committed"
    job.assert_home_is_right()
    drain_well(job.roots[0])
    assert [path.name for path in job.roots[0].iterdir() if path.name.startswith(".tmp")] == [] and job.steps_on() == [2]


def test_a_removal_at_home_that_fails_is_no_failure(tmp_path: Path, native: object) -> None:
    job = Job(tmp_path, home_keep=1)
    job.save(1)
    drain_well(job.roots[0])
    job.save(2)
    ended = drain_once(job.roots[0], prepare=fault("unlink", errno.EIO, "/.tmp-step-"))
    assert ended.returncode == 0 and "removing '" in ended.stderr and "the checkpoint is good" in ended.stderr
    assert job.state(2) == "committed" and job.steps_at_home() == [2]
    job.save(3)
    drain_well(job.roots[0])
    assert job.steps_at_home() == [3]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_an_inbox_that_cannot_be_understood_is_told(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    job.save(1)
    drain_well(job.roots[0])
    path = job.home / ".drain" / "run-1" / f"{1:012d}" / "inbox.json"
    path.write_text("{}")
    ended = drain_once(job.roots[1])
    assert ended.returncode == 5 and "cannot be understood" in ended.stderr and job.steps_at_home() == []


def test_a_journal_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    job = Job(tmp_path, pids=this_process())
    job.save(1)
    with Drain(job.roots[0], []) as drain:
        wait_for(lambda: job.state(1) == "committed", drain)
        with that_cannot_be_changed(job.roots[0] / "drain"):
            job.save(2)
            wait_for(lambda: job.steps_at_home()[-1:] == [2], drain)
            assert job.journal(2) is None
        wait_for(lambda: job.state(2) == "committed", drain)
