"""The drain that carries checkpoints from home to an object store: what arrives, what is left out, what is removed there."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
from drain_points import UPLOAD_POINTS
from node_roots import TRIES_SOON, crash_at, hold_at, this_process, wait_for
from object_server import Fault, ObjectServer, Proxy, Request
from remote_jobs import MiB, RemoteJob, read, sent_files

from ckpt.directory import holds
from ckpt.directory.holds import MOST_HELD, Holds, held_at
from ckpt.directory.in_flight import FilesInFlight
from ckpt.directory.keeping import Keeping
from ckpt.directory.listing import find_steps
from ckpt.directory.retention import Retention
from ckpt.directory.step_names import step_name
from ckpt.drain import DrainStatus, status
from ckpt.drain import node as nodes
from ckpt.drain.remote_place import release_unused
from ckpt.storage.directory_lock import DirectoryLock

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def job(tmp_path: Path, bucket: str, server: ObjectServer) -> RemoteJob:
    return RemoteJob(tmp_path, bucket, server.port)


@pytest.fixture
def proxied_job(tmp_path: Path, bucket: str, proxy: Proxy) -> RemoteJob:
    return RemoteJob(tmp_path, bucket, proxy.port)


def tidy_home(job: RemoteJob, keep: int) -> list[int]:
    """As a save does it; returns the sequences that are left, newest first."""
    path, manifest = find_steps(job.home).checkpoints[0]
    Retention(job.home, FilesInFlight(), Keeping(keep), False, 1, print, print).tidy(path, manifest, None)
    return [manifest.sequence for _, manifest in find_steps(job.home).checkpoints]


# ---- what arrives ----------------------------------------------------------------------------------------------------


def test_what_is_carried_is_what_was_saved(job: RemoteJob) -> None:
    job.save(1, 2 * MiB + 123, 0, 5000)  # of several parts, of none, of one
    job.drain_well()
    job.assert_store_is_right()
    job.assert_store_is_tidy()
    (copy,) = job.copies()
    manifest = (job.home / step_name(1) / "manifest.json").read_bytes()
    assert read(job.store, f"{copy.folder}/manifest.json") == manifest
    (said,) = status(job.place)
    assert isinstance(said, DrainStatus) and (said.state, said.bytes) == ("committed", said.total_bytes)


def test_the_newest_goes_first_and_those_before_stay_at_home(job: RemoteJob) -> None:
    for step in (1, 2, 3):
        job.save(step)
    job.drain_well()
    assert job.sequences() == [3]
    assert [job.state(sequence) for sequence in (1, 2, 3)] == ["superseded", "superseded", "committed"]


def test_a_step_that_is_saved_again_is_another_folder(job: RemoteJob) -> None:
    for _ in range(2):
        job.save(1)
        job.drain_well()
    assert job.sequences() == [2, 1] and len({copy.folder for copy in job.copies()}) == 2
    job.assert_store_is_right()


@pytest.mark.parametrize(
    ("rule", "wanted"), [({"every_steps": 2}, [4, 2]), ({"every_s": 7200.0}, [3, 1])], ids=["steps", "time"]
)
def test_a_rule_says_which_are_wanted(
    tmp_path: Path, bucket: str, server: ObjectServer, rule: dict[str, float], wanted: list[int]
) -> None:
    job = RemoteJob(tmp_path, bucket, server.port, **rule)
    for step in (1, 2, 3, 4):  # an hour after each other
        job.save(step)
        job.drain_well()
    assert job.sequences() == wanted
    assert {job.state(sequence) for sequence in (1, 2, 3, 4) if sequence not in wanted} == {"superseded"}


def test_a_file_that_is_damaged_at_home(job: RemoteJob) -> None:
    """Nothing of it is in the store under its name, and the checkpoint is none."""
    job.save(1, 3 * MiB)
    (path,) = (job.home / step_name(1)).glob("rank-*")
    with path.open("r+b") as file:
        file.seek(2 * MiB + 9)
        file.write(b"\0" * 9)
    ended = job.drain()
    assert ended.returncode == 5 and "has the CRC-32" in ended.stderr
    journal = job.journal(1)
    assert journal is not None and (journal.state, journal.next) == ("failed", None)
    assert job.keys_there() == ["run.json"]


def test_a_step_is_saved_again_while_it_is_read(job: RemoteJob) -> None:
    """Under the same names: what is read then is no damage."""
    job.save(1, 3 * MiB)
    (path,) = (job.home / step_name(1)).glob("rank-*")
    with job.start("--once", prepare=hold_at("upload-chunk")) as drain:
        wait_for(lambda: drain.is_held, drain)
        path.write_bytes(b"\0" * 3 * MiB)
        job.save(1)
        drain.signal(signal.SIGCONT)
        ended = drain.wait()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [job.state(sequence) for sequence in (1, 2)] == ["superseded", "committed"] and job.sequences() == [2]


# ---- what home keeps meanwhile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "kept"), [(None, [7, 1]), (1, [7, 6, 5, 1])])
def test_what_is_on_its_way_stays_at_home(proxied_job: RemoteJob, proxy: Proxy, every: int | None, kept: list[int]) -> None:
    """However many are saved meanwhile, and wanted."""
    job, goes_on = proxied_job, threading.Event()
    proxy.rule = lambda request: Fault(hold=goes_on) if "rank-" in request.path and request.method == "PUT" else None
    job.describe(pids=this_process(), every_steps=every)
    job.save(1)
    with job.start() as drain:
        wait_for(lambda: any("rank-" in request.path for request in proxy.requests), drain)
        for step in range(2, 8):
            job.save(step)
            tidy_home(job, keep=1)
        assert tidy_home(job, keep=1) == kept
        goes_on.set()
        wait_for(lambda: {job.state(sequence) for sequence in kept} == {"committed"}, drain)
        wait_for(lambda: tidy_home(job, keep=1) == [7], drain)
    assert job.sequences() == kept
    job.assert_store_is_right()


def test_a_store_that_is_away_does_not_fill_home(proxied_job: RemoteJob, proxy: Proxy) -> None:
    job = proxied_job
    proxy.rule = lambda _: Fault(refuse=True)
    job.describe(every_steps=1)
    for step in range(1, 7):
        job.save(step)
        job.drain(TRIES_SOON)
    assert len(held_at(job.home, [manifest for _, manifest in find_steps(job.home).checkpoints])) <= MOST_HELD
    assert tidy_home(job, keep=1)[0] == 6 and len(tidy_home(job, keep=1)) <= 1 + MOST_HELD
    proxy.rule = lambda _: None
    job.drain_well()
    assert job.sequences()[0] == 6
    job.assert_store_is_right()


def test_what_is_wanted_and_comes_late(job: RemoteJob) -> None:
    """From a node, behind a newer one about which the drain has decided."""
    job.describe(pids=this_process(), every_steps=2)
    job.save(2)
    late, on_the_node = job.home / step_name(2), job.home.with_name("late")
    late.rename(on_the_node)
    job.save(3)
    job.drain_well()
    on_the_node.rename(late)
    assert tidy_home(job, keep=1) == [2, 1]
    job.drain_well()
    assert job.sequences() == [1] and tidy_home(job, keep=1) == [2]


def test_nothing_is_kept_for_a_tier_that_is_given_no_more(job: RemoteJob) -> None:
    """The drain has ended with its job; the next job has no such tier."""
    job.describe(every_steps=1)
    job.save(1)
    job.drain_well()
    for step in (2, 3, 4):
        job.save(step)
    assert tidy_home(job, keep=1) == [4]


def test_nothing_is_kept_for_a_drain_that_was_killed(job: RemoteJob) -> None:
    """Unless it is still at work."""
    job.describe(pids=this_process(), every_steps=1)
    job.save(1)
    other = job.place.with_name("other")
    with job.start(prepare=hold_at("upload-chunk")) as drain:
        wait_for(lambda: drain.is_held, drain)
        release_unused(job.home, None)
        job.save(2)
        assert tidy_home(job, keep=1) == [2, 1]
        drain.signal(signal.SIGKILL)
        drain.wait()
    release_unused(job.home, job.place)
    assert tidy_home(job, keep=1) == [2, 1]
    release_unused(job.home, other)
    assert tidy_home(job, keep=1) == [2]


def test_by_hand_on_another_host(job: RemoteJob) -> None:
    """Whether the job goes on cannot be told there: nobody waits for its drain to end, and what it may want stays."""
    job.describe(host="another", every_steps=1)
    lock = DirectoryLock(job.place, name=nodes.LOCK)
    lock.acquire()
    ended = job.drain()
    lock.release()
    assert ended.returncode == 4 and f"is being worked on by process {os.getpid()}" in ended.stderr
    job.save(1)
    job.drain_well()
    assert holds.read(job.place) == Holds((1,), (), every_steps=1)


def test_another_process_of_the_job_gets_a_drain_of_its_own(job: RemoteJob) -> None:
    """Which has the options that it was given: credentials may be others by now."""
    job.describe(pids=this_process())
    job.save(1)
    with job.start() as drain:
        wait_for(lambda: job.state(1) == "committed", drain)
        job.describe(pids={1: 5})
        assert drain.wait().returncode == 0
    job.assert_store_is_right()


TELLS_IT_IS_IDLE = """
from pathlib import Path
from ckpt.drain import coming_home, waking
coming_home._GRACE_S = 0.0
wait = waking.Wakeful.wait
waking.Wakeful.wait = lambda self: (Path({path!r}).touch(), wait(self))
"""


def test_the_job_has_ended_and_a_node_still_delivers(job: RemoteJob) -> None:
    """What the drain of the node brings home then is carried on. The drain ends when nothing more comes."""
    inbox = job.home / ".drain" / "run-1" / f"{2:012d}"
    inbox.mkdir(parents=True)
    (job.home / ".run").write_text('{"run": "run-1"}')
    job.save(1)
    idle = job.home / "idle"
    with job.start(prepare=TELLS_IT_IS_IDLE.format(path=str(idle)).strip()) as drain:
        wait_for(idle.exists, drain)
        (inbox / "inbox.json").touch()
        job.save(2)
        (inbox / "inbox.json").unlink()
        inbox.rmdir()
        assert drain.wait().returncode == 0
    assert job.sequences() == [2, 1]


def test_home_is_away_for_a_moment(proxied_job: RemoteJob, proxy: Proxy, tmp_path: Path) -> None:
    """What waits for the store is carried when both are there again."""
    job, idle, away = proxied_job, tmp_path / "idle", tmp_path / "away"
    proxy.rule = lambda _: Fault(refuse=True)
    job.describe(pids=this_process())
    job.save(1)
    with job.start(prepare=f"{TRIES_SOON}; {TELLS_IT_IS_IDLE.format(path=str(idle)).strip()}") as drain:
        wait_for(lambda: job.state(1) == "failed", drain)
        job.home.rename(away)
        for _ in range(2):  # the second time it has looked meanwhile
            idle.unlink(missing_ok=True)
            wait_for(idle.exists, drain)
        away.rename(job.home)
        proxy.rule = lambda _: None
        wait_for(lambda: job.state(1) == "committed", drain)
    job.assert_store_is_right()


# ---- retention in the store ------------------------------------------------------------------------------------------


def test_what_is_old_goes_manifest_first(proxied_job: RemoteJob, proxy: Proxy) -> None:
    job = proxied_job
    job.describe(keep=2)
    for step in (1, 2):
        job.save(step)
        job.drain_well()
    first = job.copies()[-1].folder
    job.save(3)
    proxy.requests.clear()
    job.drain_well()
    assert job.sequences() == [3, 2]
    job.assert_store_is_tidy()
    removed = [key for request in proxy.requests for key in request.removed]
    assert removed[0].endswith(f"{first}/manifest.json")
    assert {path.rpartition("/")[2] for path in removed} == {"manifest.json", *job.content[1]}


def test_what_was_given_up_is_removed(job: RemoteJob) -> None:
    """A half that a killed drain has left, of a checkpoint that is not at home any more."""
    job.save(1)
    assert job.drain(crash_at("upload-file")).returncode == -signal.SIGKILL
    assert any("rank-" in key for key in job.keys_there())
    job.save(2)
    for path in (job.home / step_name(1)).iterdir():
        path.unlink()
    job.drain_well()
    assert job.sequences() == [2] and job.state(1) == "superseded"
    job.assert_store_is_tidy()


def test_what_cannot_be_removed_is_told_and_all_else_is_done(proxied_job: RemoteJob, proxy: Proxy) -> None:
    job = proxied_job
    job.describe(keep=1)
    job.save(1)
    job.drain_well()
    proxy.rule = lambda request: Fault(status=403) if request.removed else None
    job.save(2)
    ended = job.drain()
    assert ended.returncode == 0 and "all checkpoints are good" in ended.stderr
    assert job.sequences() == [2, 1]


# ---- faults ----------------------------------------------------------------------------------------------------------


def is_manifest(request: Request) -> bool:
    return request.is_put_of_manifest


def test_the_answer_to_the_manifest_is_lost(proxied_job: RemoteJob, proxy: Proxy) -> None:
    """It is there when it is put again: equal to the byte, so it is ours."""
    job, lost = proxied_job, []

    def rule(request: Request) -> Fault | None:
        if not is_manifest(request) or lost:
            return None
        lost.append(request)
        return Fault(answer_bytes=0)

    proxy.rule = rule
    job.save(1)
    job.drain_well()
    assert len([request for request in proxy.requests if is_manifest(request)]) >= 2
    job.assert_store_is_tidy()


def test_somebody_else_has_put_another_manifest(job: RemoteJob) -> None:
    job.save(1)
    assert job.drain(crash_at("upload-complete")).returncode == -signal.SIGKILL
    journal = job.journal(1)
    assert journal is not None
    assert job.store.create(f"{journal.inbox}/manifest.json", b"of another")
    ended = job.drain()
    assert ended.returncode == 5 and "somebody else writes there" in ended.stderr
    assert job.state(1) == "failed" and job.copies() == []


@pytest.mark.parametrize("point", ["upload-file", "upload-complete", "upload-committed"])
def test_what_a_killed_drain_has_sent_is_not_sent_again(proxied_job: RemoteJob, proxy: Proxy, point: str) -> None:
    job = proxied_job
    job.save(1, 100_000, 200_000)
    one_by_one = "from ckpt.drain import upload; upload._FILES_AT_ONCE = 1"
    assert job.drain(f"{one_by_one}; {crash_at(point)}").returncode == -signal.SIGKILL
    first = sent_files(proxy.requests, job.content[1])
    proxy.requests.clear()
    job.drain_well()
    names = sorted(job.content[1])
    sent = names[:1] if point == "upload-file" else names
    assert first == sent and sent_files(proxy.requests, job.content[1]) == names[len(sent) :]
    job.assert_store_is_right()
    job.assert_store_is_tidy()


@pytest.mark.parametrize("point", [point for point in UPLOAD_POINTS if not point.startswith("remote-")])
def test_killed_at_a_crash_point(job: RemoteJob, tmp_path: Path, bucket: str, server: ObjectServer, point: str) -> None:
    """While it takes a place over, carries, commits, and removes what is old."""
    job.save(1)
    job.drain_well()
    other = RemoteJob(tmp_path, bucket, server.port, home="other", keep=1, instead_of="owner-home", ticket="1")
    other.content[1] = job.content[1]
    other.save(2, 2 * MiB)
    assert other.drain(crash_at(point)).returncode == -signal.SIGKILL
    assert other.sequences()[0] in (1, 2)
    other.assert_store_is_right()
    other.save(3)
    other.drain_well()
    assert other.sequences() == [3]
    other.assert_store_is_right()
    other.assert_store_is_tidy()


def test_a_killed_drain_begins_a_large_file_anew(job: RemoteJob) -> None:
    job.save(1, 4 * MiB)
    assert job.drain(crash_at("upload-chunk", 2)).returncode == -signal.SIGKILL
    assert job.copies() == []
    job.drain_well()
    job.assert_store_is_right()
    job.assert_store_is_tidy()


def test_a_file_that_is_gone_from_the_store_is_sent_again(job: RemoteJob) -> None:
    job.save(1)
    assert job.drain(crash_at("upload-complete")).returncode == -signal.SIGKILL
    lost = next(key for key in job.keys_there() if "rank-00001" in key)
    job.store.remove(lost)
    ended = job.drain(TRIES_SOON)
    if ended.returncode != 0:  # it was to wait first
        job.drain_well()
    job.assert_store_is_right()
    assert job.sequences() == [1]


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429), Fault(refuse=True)], ids=["503", "429", "refused"])
def test_a_store_that_is_away_is_tried_again(proxied_job: RemoteJob, proxy: Proxy, fault: Fault) -> None:
    job = proxied_job
    proxy.rule = lambda _: fault
    job.describe(pids=this_process())
    job.save(1)
    with job.start(prepare=TRIES_SOON) as drain:
        wait_for(lambda: job.state(1) == "failed", drain)
        journal = job.journal(1)
        assert journal is not None and journal.next is not None and journal.errno != errno.EACCES
        proxy.rule = lambda _: None
        wait_for(lambda: job.state(1) == "committed", drain)
    job.assert_store_is_right()


@pytest.mark.parametrize("where", ["everything", "files"])
def test_credentials_that_are_refused(proxied_job: RemoteJob, proxy: Proxy, where: str) -> None:
    """A person has to change them: it is told once, and each later checkpoint tries once."""
    job = proxied_job
    proxy.rule = lambda request: Fault(status=403) if where == "everything" or "rank-" in request.path else None
    job.save(1)
    ended = job.drain()
    assert ended.returncode == 5 and ended.stderr.count("AccessDenied") == 1
    journal = job.journal(1)
    assert journal is not None and (journal.state, journal.next, journal.errno) == ("failed", None, errno.EACCES)
    proxy.rule = lambda _: None
    job.save(2)
    job.drain_well()
    assert job.sequences()[0] == 2


def test_a_bucket_that_is_not_there(tmp_path: Path, server: ObjectServer) -> None:
    job = RemoteJob(tmp_path, "no-such-bucket", server.port)
    job.save(1)
    ended = job.drain()
    journal = job.journal(1)
    assert ended.returncode == 5 and "NoSuchBucket" in ended.stderr
    assert journal is not None and (journal.state, journal.next) == ("failed", None)


# ---- whose the place is ----------------------------------------------------------------------------------------------


def test_a_second_job_with_the_same_url_is_refused(job: RemoteJob, tmp_path: Path, bucket: str, server: ObjectServer) -> None:
    job.save(1)
    job.drain_well()
    other = RemoteJob(tmp_path, bucket, server.port, home="other", keep=1)
    for step in (1, 2):
        other.save(step)
        ended = other.drain()
        assert ended.returncode == 5 and f"belongs to the checkpoints of '{job.home}'" in ended.stderr
    assert other.state(2) == "failed"
    job.assert_store_is_right()
    job.assert_store_is_tidy()


def test_a_home_that_takes_the_place_over_shuts_the_other_out(
    job: RemoteJob, tmp_path: Path, bucket: str, server: ObjectServer
) -> None:
    job.save(1)
    job.drain_well()
    other = RemoteJob(tmp_path, bucket, server.port, home="other", instead_of="owner-home", ticket="1")
    other.content[1] = job.content[1]
    other.save(2)
    other.drain_well()
    job.save(3)
    job.save(4)
    ended = job.drain()
    assert ended.returncode == 5 and f"belongs to the checkpoints of '{other.home}'" in ended.stderr
    job.describe(instead_of="owner-other", ticket="2")  # and back again
    job.drain_well()
    assert job.sequences()[0] == 3
    other.save(5)
    ended = other.drain()
    assert ended.returncode == 5 and "belongs to" in ended.stderr, "what it has taken once it does not take again"


def test_two_that_come_at_the_same_time(job: RemoteJob, tmp_path: Path, bucket: str, server: ObjectServer) -> None:
    """One of them creates run.json; the other is refused."""
    other = RemoteJob(tmp_path, bucket, server.port, home="other")
    jobs = [job, other]
    for each in jobs:
        each.save(1)
    drains = [each.start("--once") for each in jobs]
    codes = [drain.wait().returncode for drain in drains]
    assert sorted(codes) == [0, 5] and job.sequences() == [1]
    jobs[codes.index(0)].assert_store_is_right()
