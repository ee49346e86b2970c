"""Which generations come home, which are superseded, and which may go from the node."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from node_roots import Drain, Job, MiB, crash_at, drain_once, drain_well, hold_at, this_process, wait_for

from ckpt.directory import manifest as manifests
from ckpt.directory.step_names import names_in, step_name

CRASHES = pytest.mark.usefixtures("native")


def states(job: Job, node: int = 0) -> list[str]:
    return [job.state(sequence, node) for sequence in range(1, job.sequence + 1)]


def test_newer_ones_come_while_one_is_on_its_way(tmp_path: Path) -> None:
    """It goes on: else saves that come faster than copies would never let any arrive. The newest is next."""
    job = Job(tmp_path, pids=this_process())
    job.save(1, 12 * MiB)
    with Drain(job.roots[0], [], hold_at("drain-chunk")) as drain:
        wait_for(lambda: drain.is_held, drain)
        assert job.state(1) == "copying"
        for step in (2, 3, 4, 5):
            job.save(step)
        drain.signal(signal.SIGCONT)
        wait_for(lambda: job.state(5) == "committed", drain)
        wait_for(lambda: job.steps_on() == [4, 5], drain)
    assert states(job) == ["committed", "superseded", "superseded", "superseded", "committed"]
    journal = job.journal(4)
    assert journal is not None and journal.by == 5
    assert job.steps_at_home() == [1, 5]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


@CRASHES
def test_one_that_is_superseded_on_its_way_is_not_committed_over_a_newer_one(tmp_path: Path) -> None:
    """As when a save has gone straight home meanwhile."""
    (tmp_path / "other").mkdir()
    job, other = Job(tmp_path), Job(tmp_path / "other", home=tmp_path / "home")
    job.save(1)
    assert drain_once(job.roots[0], prepare=crash_at("drain-chunk")).returncode < 0
    other.sequence = job.sequence = 5
    other.save(9)
    job.saved[6] = other.saved[6]
    drain_well(other.roots[0])
    drain_well(job.roots[0])
    journal = job.journal(1)
    assert journal is not None and (journal.state, journal.by) == ("superseded", 6)
    assert job.steps_at_home() == [9]
    job.assert_home_is_right()


def test_a_step_that_is_saved_again_takes_the_place_of_the_old_one_at_home(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    for _ in range(3):
        job.save(1, common=4 * MiB)
        for root in (*job.roots, *job.roots):
            drain_well(root)
        job.assert_home_is_right()
        job.assert_home_is_tidy()
    assert job.steps_at_home() == [1] and manifests.read(job.home / step_name(1)).sequence == 3


def test_a_name_that_is_taken_at_home_is_not_replaced(tmp_path: Path) -> None:
    job = Job(tmp_path)
    (job.home / step_name(1)).mkdir()
    (job.home / step_name(1) / "rank-00000.pt").write_text("of somebody else")
    (job.home / step_name(1) / "notes.txt").write_text("too")
    job.save(1)
    drain_well(job.roots[0])
    manifest = manifests.read(job.home / step_name(1))
    assert [file.name for file in manifest.files] == ["rank-00000-2.pt"]
    assert manifest.others == ("notes.txt", "rank-00000.pt")
    assert (job.home / step_name(1) / "rank-00000.pt").read_text() == "of somebody else"
    job.assert_home_is_right()


def test_a_step_is_saved_again_while_the_old_one_drains(tmp_path: Path) -> None:
    job = Job(tmp_path, pids=this_process())
    job.save(1, 20 * MiB)
    with Drain(job.roots[0], [], hold_at("drain-chunk")) as drain:
        wait_for(lambda: drain.is_held, drain)
        assert job.state(1) == "copying"
        job.save(1, MiB)  # which removes the file that is being read
        drain.signal(signal.SIGCONT)
        wait_for(lambda: job.state(2) == "committed", drain)
        assert job.state(1) in ("committed", "superseded")
    assert manifests.read(job.home / step_name(1)).sequence == 2
    job.assert_home_is_right()
    job.assert_home_is_tidy()


@CRASHES
def test_a_step_is_saved_again_before_its_files_were_opened(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1)
    assert drain_once(job.roots[0], prepare=crash_at("drain-inbox-renamed")).returncode < 0
    job.save(1)
    drain_well(job.roots[0])
    assert states(job) == ["superseded", "committed"]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_every_nth_step_comes_home_whatever_is_newer(tmp_path: Path) -> None:
    job = Job(tmp_path, home_every={"steps": 5})
    for step in range(1, 13):
        job.save(step)
    drain_well(job.roots[0])
    assert job.steps_at_home() == [5, 10, 12]
    assert job.steps_on() == [11, 12]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_one_each_so_many_seconds_comes_home(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2, home_every={"seconds": 60})
    for number in range(10):
        job.save(number, created=f"2026-01-01T00:{number // 2:02d}:{30 * (number % 2):02d}+00:00")
    for _ in range(3):
        for root in job.roots:
            drain_well(root)
    assert job.steps_at_home() == [0, 2, 4, 6, 8, 9]
    job.assert_home_is_right()


def test_home_keeps_what_it_is_told(tmp_path: Path) -> None:
    job = Job(tmp_path, home_keep=2, keep=1)
    for step in range(5):
        job.save(step)
        drain_well(job.roots[0])
    assert job.steps_at_home() == [3, 4] and job.steps_on() == [4]
    job.assert_home_is_tidy()


def test_what_home_keeps_for_ever_comes_there_although_newer_ones_are_there(tmp_path: Path) -> None:
    job = Job(tmp_path, home_keep=1, home_keeps_too={"every": 4, "best": 1, "by": "loss"}, keep=1)
    for step, loss in enumerate((3.0, 0.5, 2.0, 2.0, 2.0, 1.0, 2.0)):
        job.save(step, metrics=(("loss", loss),))
    for _ in range(2):
        drain_well(job.roots[0])
    assert job.steps_at_home() == [0, 1, 4, 6]
    job.save(7, metrics=(("loss", 0.25),))
    drain_well(job.roots[0])
    assert job.steps_at_home() == [0, 4, 7]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_what_is_not_home_yet_stays_on_the_node(tmp_path: Path) -> None:
    job = Job(tmp_path, keep=1, home_every={"steps": 1})
    for step in (1, 2, 3):
        job.save(step)
    (job.home / ".run").rename(job.home / ".away")
    assert drain_once(job.roots[0]).returncode == 5
    assert job.steps_on() == [1, 2, 3]
    (job.home / ".away").rename(job.home / ".run")
    drain_well(job.roots[0])
    assert job.steps_on() == [3] and job.steps_at_home() == [1, 2, 3]


def test_the_newest_stays_on_the_node(tmp_path: Path) -> None:
    job = Job(tmp_path, keep=1)
    job.save(1)
    for _ in range(3):
        drain_well(job.roots[0])
    assert job.steps_on() == [1] and job.state(1) == "committed"


def test_what_is_not_committed_on_the_node_is_left_alone(tmp_path: Path) -> None:
    """An uncommitted newer directory beside the only good one; and a step that is just being saved again."""
    job = Job(tmp_path, keep=1)
    job.save(1)
    bare = job.roots[0] / step_name(9)
    bare.mkdir()
    (bare / "rank-00000.pt").write_bytes(b"not complete")
    drain_well(job.roots[0])
    assert job.steps_on() == [1, 9] and job.steps_at_home() == [1]
    job.save(2)
    writing = job.roots[0] / step_name(1) / "rank-00000-2.pt"
    writing.write_bytes(b"on its way")
    drain_well(job.roots[0])
    assert job.steps_on() == [1, 2, 9] and writing.exists()
    writing.unlink()
    drain_well(job.roots[0])
    assert job.steps_on() == [2, 9]


def test_what_a_replaced_step_has_left_keeps_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, keep=1)
    job.save(1)
    left = job.roots[0] / step_name(1) / "rank-00000-7.pt"
    left.write_bytes(b"older than the manifest")
    os.utime(left, (1, 1))
    job.save(2)
    drain_well(job.roots[0])
    assert job.steps_on() == [2]


def test_home_leaves_a_step_that_somebody_is_saving(tmp_path: Path) -> None:
    job = Job(tmp_path, home_keep=1)
    job.save(1)
    drain_well(job.roots[0])
    writing = job.home / step_name(1) / ".tmp-rank-00000-2.pt-00000000-1-000000000"
    writing.write_bytes(b"on its way")
    job.save(2)
    drain_well(job.roots[0])
    assert job.steps_at_home() == [1, 2]
    writing.unlink()
    job.save(3)
    drain_well(job.roots[0])
    assert job.steps_at_home() == [3]


@CRASHES
def test_an_older_one_is_not_the_latest(tmp_path: Path) -> None:
    job = Job(tmp_path, home_every={"steps": 1})
    for step in (1, 2):
        job.save(step)
    for point in ("drain-committed", "latest-written"):  # of the newer one, and of the older
        drain_once(job.roots[0], prepare=crash_at(point))
        assert (job.home / "latest").read_text() == f"{step_name(2)}\n"
    drain_well(job.roots[0])
    assert job.steps_at_home() == [1, 2] and (job.home / "latest").read_text() == f"{step_name(2)}\n"
    job.assert_home_is_tidy()


@pytest.mark.parametrize("kind", ["sharded", "sharded-checksums"])
def test_names_that_other_files_name_stay(kind: str, tmp_path: Path) -> None:
    """`.metadata` names the data files: one of them that cannot have its name would be read for another."""
    job = Job(tmp_path)
    saved = job.place(1, {"rank-00000.pt": b"x" * 5000})
    data = job.roots[0] / step_name(1) / "__0_0.distcp"
    (job.roots[0] / step_name(1) / "rank-00000.pt").rename(data)
    entry = saved.manifest.files[0]
    changed = manifests.Manifest(
        1, 1, 1, (manifests.FileEntry("__0_0.distcp", entry.bytes, entry.crc32, kind, 0),), saved.manifest.created
    )
    (data.parent / manifests.NAME).write_bytes(changed.to_json())
    (job.home / step_name(1)).mkdir()
    (job.home / step_name(1) / "__0_0.distcp").write_bytes(b"another")
    ended = drain_once(job.roots[0])
    assert ended.returncode == 5 and "can get no other name" in ended.stderr
    assert names_in(job.home / step_name(1)) == {"__0_0.distcp"} and job.steps_at_home() == []
    (job.home / step_name(1) / "__0_0.distcp").unlink()
    journal = job.journal(1)
    assert journal is not None and journal.state == "failed"
