"""What waiting saves are told of their way home, by real drains that are killed, hindered and overtaken."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from node_roots import (
    DEADLINE_S,
    Job,
    Saved,
    crash_at,
    drain_once,
    drain_well,
    fault,
    that_cannot_be_changed,
    this_process,
    wait_for,
)
from tier_places import ending, kill, storage_of, trained_job

from ckpt.directory import manifest as manifests
from ckpt.directory.step_names import step_name
from ckpt.errors import ClosedError, CorruptError, DeadlineError, ForkedError, SkippedError, StorageError, SupersededError
from ckpt.tiers import home_watch
from ckpt.tiers.drain_process import DrainProcess
from ckpt.tiers.home_watch import HomeWatch


class Told:
    """What becomes of saves, in order."""

    def __init__(self) -> None:
        self.all: queue.SimpleQueue[tuple[int, Path | BaseException]] = queue.SimpleQueue()

    def watch(self, watch: HomeWatch, saved: Saved) -> None:
        sequence, step = saved.manifest.sequence, saved.manifest.step

        def tell(end: Path | BaseException) -> None:
            self.all.put((sequence, end))

        watch.watch(sequence, step, step_name(step), tell, tell)

    def next(self, count: int = 1) -> dict[int, Path | BaseException]:
        return dict(self.all.get(timeout=DEADLINE_S) for _ in range(count))


@contextmanager
def watching(job: Job, base: Path, *, started: bool = True) -> Iterator[tuple[HomeWatch, DrainProcess]]:
    """
    Args:
        started: the drain; else whoever waits starts it.
    """
    with ending(DrainProcess(job.roots[0])) as drain:
        if started:
            assert drain.ensure() == ""
        watch = HomeWatch(storage_of(job, base), drain)
        try:
            yield watch, drain
        finally:
            watch.close(0.0)


def test_a_save_is_told_that_it_is_home(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    with watching(job, tmp_path) as (watch, _):
        for step in (1, 2):
            saved = job.save(step)
            told.watch(watch, saved)
            assert told.next() == {saved.manifest.sequence: job.home / step_name(step)}
            job.assert_home_is_right()
        assert watch.wait(DEADLINE_S) and not watch.awaits_any


def test_what_is_home_already_is_told_at_once(tmp_path: Path) -> None:
    job, told = Job(tmp_path), Told()
    saved = job.save(1)
    drain_well(job.roots[0])
    again = job.save(2)
    drain_well(job.roots[0])
    (job.roots[0] / "drain" / "000000000001.json").unlink()  # forgotten
    watch = HomeWatch(storage_of(job, tmp_path), None)
    told.watch(watch, again)
    assert told.next() == {2: job.home / step_name(2)}
    job.save(1)  # the directory on the node is another one's by now
    told.watch(watch, saved)
    assert told.next() == {1: job.home / step_name(1)}
    watch.close(0.0)


def test_its_thread_ends_with_what_it_waits_for(tmp_path: Path, leaks_nothing: object) -> None:
    job, told = trained_job(tmp_path), Told()
    with watching(job, tmp_path) as (watch, _):
        for step in (1, 2):
            told.watch(watch, job.save(step))
            assert any(thread.name == "ckpt-home-watch" for thread in threading.enumerate())
            told.next()
            wait_for(lambda: not any(thread.name == "ckpt-home-watch" for thread in threading.enumerate()))


# ---- the drain ends --------------------------------------------------------------------------------------------------


def test_a_drain_that_nobody_has_started_is_started(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    with watching(job, tmp_path, started=False) as (watch, drain):
        told.watch(watch, job.save(1))
        assert told.next() == {1: job.home / step_name(1)} and drain.pid != 0


def test_a_drain_that_is_killed_on_the_way_is_started_again(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path, rate=1_000_000), Told()
    with watching(job, tmp_path) as (watch, drain):
        first = drain.pid
        # The first chunk of 8 MiB goes at once; the next one would have to wait for that.
        saved = job.save(1, size=9 << 20)
        told.watch(watch, saved)
        wait_for(lambda: job.state(1) == "copying")
        kill(first)
        job.describe(0, rate=10**12, pids=this_process())
        assert told.next() == {1: job.home / step_name(1)}
        assert drain.pid not in (0, first)
        job.assert_home_is_right()


def test_a_drain_that_cannot_be_started_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_watch, "_SHORTEST_RESTART_S", 0.01)
    monkeypatch.setattr(home_watch, "_STANDSTILL_S", 0.05)
    job, told = trained_job(tmp_path), Told()
    (job.roots[0] / "drain.log").mkdir()
    with caplog.at_level(logging.WARNING, "ckpt"), watching(job, tmp_path, started=False) as (watch, _):
        told.watch(watch, job.save(1))
        wait_for(lambda: sum("nothing moves" in record.getMessage() for record in caplog.records) == 3)
        (job.roots[0] / "drain.log").rmdir()
        assert told.next() == {1: job.home / step_name(1)}
    assert sum("cannot start the drain" in record.getMessage() for record in caplog.records) == 1
    waited = [record.args[2] for record in caplog.records if "nothing moves" in record.getMessage()][:3]  # type: ignore[index]
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(waited)), "at each doubling"


# ---- others go first -------------------------------------------------------------------------------------------------


def test_saves_that_a_newer_one_overtakes_are_told_which(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    saves = [job.save(step) for step in (10, 20, 30, 40)]
    with watching(job, tmp_path, started=False) as (watch, _):
        for saved in saves:
            told.watch(watch, saved)
        found = told.next(4)
    assert found[4] == job.home / step_name(40)
    for sequence, step in ((1, 10), (2, 20), (3, 30)):
        error = found[sequence]
        assert isinstance(error, SupersededError) and isinstance(error, SkippedError)
        assert (error.step, error.by_step) == (step, 40)
        assert f"step {step} did not come to '{job.home}': the newer step 40" in str(error)


def test_a_step_that_is_saved_again_before_it_is_noted_is_superseded(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    first, again = job.save(5), job.save(5)
    with watching(job, tmp_path, started=False) as (watch, _):
        told.watch(watch, first)
        told.watch(watch, again)
        found = told.next(2)
    error = found[1]
    assert isinstance(error, SupersededError) and (error.step, error.by_step) == (5, 5) and "saved again" in str(error)
    assert found[2] == job.home / step_name(5)
    job.assert_home_is_right()


def test_a_step_that_is_saved_again_while_it_is_copied_is_superseded(tmp_path: Path) -> None:
    """And the drain ends meanwhile: else it would go on to the end of the file that it has open."""
    job, told = trained_job(tmp_path, rate=1_000_000), Told()
    with watching(job, tmp_path) as (watch, drain):
        told.watch(watch, job.save(5, size=9 << 20))  # the first chunk of 8 MiB goes at once, the next one has to wait
        wait_for(lambda: job.state(1) == "copying")
        again = job.save(5)
        kill(drain.pid)
        job.describe(0, rate=10**12, pids=this_process())
        told.watch(watch, again)
        found = told.next(2)
    assert isinstance(found[1], SupersededError) and "saved again" in str(found[1])
    assert found[2] == job.home / step_name(5)
    job.assert_home_is_right()


def test_a_manifest_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    """Another rank of the node writes it."""
    job, told = trained_job(tmp_path), Told()
    saved = job.save(5)
    manifest = job.roots[0] / step_name(5) / manifests.NAME
    manifest.rename(tmp_path / "later")
    with watching(job, tmp_path) as (watch, _):
        told.watch(watch, saved)
        assert not watch.wait(0.2)
        (tmp_path / "later").rename(manifest)
        assert told.next() == {1: job.home / step_name(5)}


def test_what_the_drain_did_not_find_any_more_is_said_to_be_gone(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    saved = job.save(5)
    assert drain_once(job.roots[0], prepare=crash_at("drain-copied")).returncode == -9
    shutil.rmtree(job.roots[0] / step_name(5))
    assert drain_once(job.roots[0]).returncode == 5
    assert job.state(1) == "failed"
    watch = HomeWatch(storage_of(job, tmp_path), None)
    told.watch(watch, saved)
    (error,) = told.next().values()
    assert isinstance(error, StorageError) and "not on the node any more" in str(error)
    assert "is a checkpoint on the nodes" not in str(error)
    watch.close(0.0)


def test_what_was_removed_from_the_node_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk may be lost. Nothing has taken its place, as long as nothing newer lies anywhere; home, too, is asked."""
    monkeypatch.setattr(home_watch, "_GRACE_S", 0.1)
    job, told = trained_job(tmp_path), Told()
    saved = job.save(5)
    job.roots[0].rename(tmp_path / "elsewhere")
    (job.home / ".run").rename(tmp_path / "away")
    watch = HomeWatch(storage_of(job, tmp_path), None)
    told.watch(watch, saved)
    assert not watch.wait(0.3), "home may have it"
    (tmp_path / "away").rename(job.home / ".run")
    (error,) = told.next().values()
    assert isinstance(error, StorageError) and "not on the node any more" in str(error)
    (tmp_path / "elsewhere").rename(job.roots[0])
    job.save(6)
    (job.roots[0] / step_name(5)).rename(tmp_path / "elsewhere")
    told.watch(watch, saved)
    (error,) = told.next().values()
    assert isinstance(error, SupersededError) and error.by_step is None
    watch.close(0.0)


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_damaged_file_fails_its_save_alone(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    with watching(job, tmp_path) as (watch, _):
        saved = job.save(1)
        told.watch(watch, saved)
        told.next()
        saved = job.place(2, {"rank-00000.pt": b"x" * 1000})
        # the drain may have it already: so the next one is damaged before its manifest stands
        told.watch(watch, saved)
        told.next()
        damaged = _place_damaged(job, 3)
        told.watch(watch, damaged)
        (error,) = told.next().values()
        assert isinstance(error, CorruptError) and "step 3" in str(error) and "rank-00000.pt.damaged" in str(error)
        told.watch(watch, job.save(4))
        assert told.next() == {4: job.home / step_name(4)}
    assert job.steps_at_home() == [1, 2, 4]


def _place_damaged(job: Job, step: int) -> Saved:
    """What was written is other than what the manifest says."""
    real = manifests.Manifest.to_json
    directory = job.roots[0] / step_name(step)

    def damage_first(manifest: manifests.Manifest) -> bytes:
        (directory / "rank-00000.pt").write_bytes(b"y" * 1000)
        return real(manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests.Manifest, "to_json", damage_first)
        return job.place(step, {"rank-00000.pt": b"x" * 1000})


def test_a_home_that_takes_nothing_fails_the_save_for_good(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    with that_cannot_be_changed(job.home), watching(job, tmp_path) as (watch, _):
        told.watch(watch, job.save(1))
        (error,) = told.next().values()
        assert isinstance(error, StorageError) and error.errno == errno.EPERM
        assert error.filename == str(job.home / step_name(1)) and "Let the job write there" in str(error)
    with watching(job, tmp_path) as (watch, _):
        told.watch(watch, job.save(2))
        assert told.next() == {2: job.home / step_name(2)}


def test_what_another_node_cannot_deliver_fails_on_all(tmp_path: Path, native: object) -> None:
    """Who waits is not to wait for ever: it is told which node it is, and why."""
    job, told = trained_job(tmp_path, nodes=2), Told()
    job.describe(1)  # nobody trains there any more
    with watching(job, tmp_path) as (watch, _):
        told.watch(watch, job.save(1))
        assert drain_once(job.roots[1], prepare=fault("open", errno.EROFS, "/rank-00001.pt.part")).returncode == 5
        (error,) = told.next().values()
        assert isinstance(error, StorageError) and error.errno == errno.EROFS
        for part in ("step 1 was not carried", "node 1 (", "rank-00001.pt.part", "Let the job write there"):
            assert part in str(error)
        drain_well(job.roots[1])
        told.watch(watch, job.save(2))
        drain_well(job.roots[1])
        assert told.next() == {2: job.home / step_name(2)}


def test_what_is_in_the_way_is_told_at_each_doubling_until_it_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, told = trained_job(tmp_path), Told()
    obstacle = job.home / ".drain" / "publish.lock"
    obstacle.mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "ckpt"), watching(job, tmp_path) as (watch, _):
        told.watch(watch, job.save(1))
        wait_for(lambda: (journal := job.journal(1)) is not None and journal.attempts >= 2)
        wait_for(lambda: len(caplog.records) >= 2)
        obstacle.rmdir()
        assert told.next() == {1: job.home / step_name(1)}
    texts = [record.getMessage() for record in caplog.records]
    assert all("carrying step 1" in text and "Move away what is in the way" in text for text in texts)
    assert f"{obstacle}': Is a directory (EISDIR)" in texts[0]
    attempts = (job.journal(1) or pytest.fail()).attempts
    assert len(texts) <= attempts.bit_length(), "one for each doubling"


def test_a_home_of_another_run_says_so_after_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drain finds that before it begins anything, so no journal tells."""
    monkeypatch.setattr(home_watch, "_STANDSTILL_S", 0.2)
    job, told = trained_job(tmp_path), Told()
    (job.home / ".run").write_text('{"run": "another"}')
    with caplog.at_level(logging.WARNING, "ckpt"), watching(job, tmp_path) as (watch, _):
        told.watch(watch, job.save(1))
        wait_for(lambda: "home of the run another" in caplog.text)
        watch.close(0.0)
        (error,) = told.next().values()
        assert isinstance(error, DeadlineError) and step_name(1) in str(error)
        assert "by the time that what has saved it was closed" in str(error) and "0 s" not in str(error)


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_closing_ends_what_is_left_and_the_drain_goes_on(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    with ending(DrainProcess(job.roots[0])) as drain:
        watch = HomeWatch(storage_of(job, tmp_path), None)
        told.watch(watch, job.save(1))
        assert watch.awaits_any and not watch.wait(0.05)
        watch.close(0.05)
        watch.close(0.05)
        (error,) = told.next().values()
        assert isinstance(error, DeadlineError) and "drain carries it" in str(error) and not watch.awaits_any
        with pytest.raises(ClosedError):
            told.watch(watch, job.save(2))
        drain.ensure()
        wait_for(lambda: job.state(2) == "committed")
    assert told.all.empty()


def test_closing_waits_for_what_comes(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    with watching(job, tmp_path) as (watch, _):
        told.watch(watch, job.save(1))
        watch.close(DEADLINE_S)
        assert told.all.get_nowait() == (1, job.home / step_name(1))


def test_an_error_of_who_is_told_reaches_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, told = trained_job(tmp_path), Told()

    def broken(_: object) -> None:
        raise RuntimeError("broken")

    with watching(job, tmp_path, started=False) as (watch, _):
        job.save(1)
        watch.watch(1, 1, step_name(1), broken, broken)
        told.watch(watch, job.save(2))
        assert told.next() == {2: job.home / step_name(2)}
        assert watch.wait(DEADLINE_S)
    assert "broken" in caplog.text


def test_a_forked_child_is_told_that_it_has_no_watch(tmp_path: Path) -> None:
    job, told = trained_job(tmp_path), Told()
    with watching(job, tmp_path) as (watch, _):
        told.watch(watch, job.save(1))
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                watch.look_now()
                watch.close(DEADLINE_S)
                try:
                    watch.watch(9, 9, step_name(9), print, print)
                except ForkedError:
                    status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert told.next() == {1: job.home / step_name(1)}


def test_what_is_home_is_told_though_the_node_takes_no_journal(tmp_path: Path) -> None:
    """Its disk may be full, or fail, once a checkpoint has landed there."""
    job, told = trained_job(tmp_path), Told()
    job.save(1)
    drain_well(job.roots[0])
    with that_cannot_be_changed(job.roots[0] / "drain"), watching(job, tmp_path) as (watch, _):
        saved = job.save(2)
        told.watch(watch, saved)
        assert told.next() == {2: job.home / step_name(2)}
    job.assert_home_is_right()


def test_a_failure_is_told_though_the_node_takes_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who waits would wait for ever. Once the node takes journals again, home is as it was."""
    monkeypatch.setattr(home_watch, "_LOOK_AT_HOME_S", 0.1)
    job, told = trained_job(tmp_path), Told()
    job.save(1)
    drain_well(job.roots[0])
    with watching(job, tmp_path) as (watch, _):
        with that_cannot_be_changed(job.roots[0] / "drain"):
            told.watch(watch, _place_damaged(job, 2))
            (error,) = told.next().values()
            assert isinstance(error, CorruptError) and "step 2" in str(error) and "rank-00000.pt.damaged" in str(error)
        wait_for(lambda: job.state(2) == "failed")
        wait_for(lambda: not list((job.home / ".drain").glob("*/ended-*")))
