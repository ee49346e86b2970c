"""Bundles: files with names that somebody else gives, of two ranks in one process: a checkpoint together, or none."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options, patience
from test_ranks_apart import IMPATIENT, PATIENT, Threaded, Wire

import ckpt
from ckpt.errors import CheckpointError, CorruptError, InUseError, PeerError, SkippedError, StorageError
from ckpt.saving import inspection
from ckpt.storage.directory_lock import DirectoryLock

FILES = ("model_states.pt", "rank_{rank}_optim_states.pt")


def content(rank: int, value: float) -> dict[str, Any]:
    return {"rank": rank, "weights": torch.full((100_000,), value), "note": f"of {value}"}


class Job:
    """Both ranks. Rank 0 writes the model too."""

    def __init__(self, root: Path, nodes: bool = False, varying: tuple[str, ...] = (), **how: Any) -> None:
        wire = Wire()
        self.roots = [root / f"node-{rank}" if nodes else root for rank in range(2)]
        self.ranks = [
            ckpt.BundleCheckpointer(
                options=options(**({"max_failed_saves": 0} | PATIENT | how)),
                coordinator=Threaded(wire, rank),
                node=f"node-{rank}" if nodes else None,
                leads_node=nodes,
                varying=varying,
            )
            for rank in range(2)
        ]

    def both(self, act: Any) -> list[Any]:
        def run(rank: int) -> Any:
            try:
                return act(rank)
            except CheckpointError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, range(2)))

    def begin(self, rank: int, name: str, value: float, **how: Any) -> Any:
        bundle = self.ranks[rank].begin(self.roots[rank], name, **how)
        for file in FILES[rank:]:
            bundle.save(content(rank, value), self.roots[rank] / name / file.format(rank=rank))
        return bundle

    def save(self, name: str, value: float, **how: Any) -> list[BaseException | None]:
        pending = self.both(lambda rank: self.begin(rank, name, value, **how).commit())
        return [each if isinstance(each, BaseException) else each.exception(60) for each in pending]

    def find(self, name: str | None = None) -> list[Any]:
        return self.both(lambda rank: self.ranks[rank].find(self.roots[rank], name))

    def assert_found(self, name: str, value: float, latest: str | None = None) -> None:
        assert self.find() == [name, name]
        for rank in range(2):
            for file in FILES[rank:]:
                path = self.roots[rank] / name / file.format(rank=rank)
                assert_same(content(rank, value), torch.load(path))
            assert (self.roots[rank] / "latest").read_text() == (latest or name)

    def temporaries(self) -> list[Path]:
        return [path for root in {*self.roots} for path in root.rglob(".tmp-*")]

    def close(self) -> None:
        for checkpointer in self.ranks:
            with contextlib.suppress(CheckpointError):
                checkpointer.close()


@pytest.fixture(params=[PATIENT], ids=[""])
def job(request: pytest.FixtureRequest, tmp_path: Path, native: Any) -> Iterator[Job]:
    job = Job(tmp_path, **request.param)
    yield job
    native.clear_faults()
    job.close()


impatient = pytest.mark.parametrize("job", [IMPATIENT], ids=[""], indirect=True)


def test_files_of_both_ranks_become_one_checkpoint(job: Job) -> None:
    assert job.find() == [None, None]
    assert job.save("a", 1.0, step=7) == [None, None]
    job.assert_found("a", 1.0)
    manifest = json.loads((job.roots[0] / "a" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (7, 2)
    assert sorted(file["name"] for file in manifest["files"]) == sorted(
        ["model_states.pt", "rank_0_optim_states.pt", "rank_1_optim_states.pt"]
    )
    assert job.save("b", 2.0) == [None, None]
    job.assert_found("b", 2.0)
    assert job.find("a") == ["a", "a"] and job.find("c") == [None, None]
    assert not job.temporaries()


def test_latest_is_left_alone_if_asked(job: Job) -> None:
    assert job.save("a", 1.0) == [None, None]
    assert job.save("best", 2.0, move_latest=False) == [None, None]
    job.assert_found("a", 1.0)


def test_one_is_saved_again(job: Job) -> None:
    for value in (1.0, 2.0, 3.0):
        assert job.save("a", value) == [None, None]
        job.assert_found("a", value)
    assert not job.temporaries()


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "write"])
def test_one_that_fails_leaves_the_old_one(job: Job, native: Any, call: str) -> None:
    assert job.save("a", 1.0) == [None, None]
    native.set_fault(call, path_part="manifest" if call == "write" else "rank_1", error=errno.EIO)
    errors = job.save("a", 2.0)
    assert all(isinstance(error, (StorageError, PeerError)) for error in errors), errors
    native.clear_faults()
    job.assert_found("a", 1.0)
    assert not job.temporaries()
    assert job.save("a", 3.0) == [None, None]
    job.assert_found("a", 3.0)


def test_what_is_decided_is_completed_later(job: Job, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A file of rank 1 does not get its name: the bundle is a checkpoint all the same, and the next who looks gives it."""
    assert job.save("a", 1.0) == [None, None]
    native.set_fault("rename", path_part="rank_1", count=1, error=errno.EIO)
    errors = job.save("b", 2.0)
    assert isinstance(errors[1], StorageError) and isinstance(errors[0], PeerError)
    assert "rank 1" in str(errors[0]) and (job.roots[0] / "latest").read_text() == "a"
    assert [path.name.startswith(".tmp-rank_1") for path in job.temporaries()] == [True]
    assert job.find("b") == ["b", "b"]
    assert_same(content(1, 2.0), torch.load(job.roots[1] / "b" / "rank_1_optim_states.pt"))
    assert not job.temporaries()


def test_a_manifest_that_may_not_last(job: Job, native: Any) -> None:
    """It has its name, and the fsync of the directory fails: what it says must stay true."""
    assert job.save("a", 1.0) == [None, None]
    native.set_fault("fsync", path_part="/a", skip=1, count=1, error=errno.EIO)  # the first is of the manifest
    errors = job.save("a", 2.0)
    assert isinstance(errors[0], StorageError) and isinstance(errors[1], PeerError)
    native.clear_faults()
    job.assert_found("a", 2.0)


def test_latest_that_cannot_be_moved(job: Job, native: Any) -> None:
    assert job.save("a", 1.0) == [None, None]
    native.set_fault("rename", path_part="/latest", count=1, error=errno.EIO)
    errors = job.save("b", 2.0)
    assert isinstance(errors[0], StorageError) and "it is a checkpoint" in str(errors[1])
    assert job.find() == ["a", "a"] and job.find("b") == ["b", "b"]


@impatient
def test_a_rank_that_does_not_come(job: Job) -> None:
    assert job.save("a", 1.0) == [None, None]
    late: list[Any] = job.both(lambda rank: self_begin(job, rank))
    assert isinstance(late[0].commit().exception(20), PeerError)
    assert isinstance(late[1].commit().exception(20), CheckpointError)
    job.assert_found("a", 1.0)
    assert job.save("a", 3.0) == [None, None]
    job.assert_found("a", 3.0)


def self_begin(job: Job, rank: int) -> Any:
    return job.begin(rank, "a", 2.0)


@impatient
def test_a_rank_that_misses_the_verdict_keeps_its_files(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot know whether the manifest names them."""
    assert job.save("a", 1.0) == [None, None]

    def broadcast(key: str, payload: bytes | None, timeout_s: float) -> bytes:
        if "prepared-verdict" in key:
            raise PeerError("rank 0 said nothing", (0,))
        return Threaded.broadcast(inspection.coordinator_of(job.ranks[1]), key, payload, timeout_s)  # type: ignore[arg-type]

    monkeypatch.setattr(inspection.coordinator_of(job.ranks[1]), "broadcast", broadcast)
    errors = job.save("a", 2.0)
    assert all(isinstance(error, PeerError) for error in errors), errors
    monkeypatch.undo()
    job.assert_found("a", 2.0)
    assert not job.temporaries()


def test_what_cannot_be_pickled_fails_on_all_ranks(job: Job) -> None:
    def act(rank: int) -> BaseException | None:
        bundle = job.begin(rank, "a", 1.0)
        if rank == 1:
            bundle.save(lambda: None, job.roots[1] / "a" / "more.pt")
        return bundle.commit().exception(20)

    errors = job.both(act)
    assert "pickle" in str(errors[1]).lower() and isinstance(errors[0], PeerError) and "rank 1" in str(errors[0])
    assert job.find() == [None, None] and not job.temporaries()


def test_two_ranks_that_write_the_same_file(job: Job) -> None:
    def act(rank: int) -> BaseException | None:
        bundle = job.ranks[rank].begin(job.roots[rank], "a")
        bundle.save(content(rank, 1.0), job.roots[rank] / "a" / "same.pt")
        return bundle.commit().exception(20)

    errors = job.both(act)
    assert all("ranks 0 and 1 both write 'same.pt'" in str(error) for error in errors), errors
    assert not job.temporaries()


def test_ranks_that_save_different_bundles(job: Job) -> None:
    errors = job.both(lambda rank: job.begin(rank, f"of-{rank}", 1.0).commit().exception(20))
    assert all("rank 1 saves 'of-1' where rank 0 saves 'of-0'" in str(error) for error in errors), errors


def test_a_file_beside_the_bundle_comes_with_it(job: Job) -> None:
    def act(rank: int) -> BaseException | None:
        bundle = job.ranks[rank].begin(job.roots[rank], "a", move_latest=False)
        if rank == 0:
            bundle.save(content(0, 1.0), job.roots[0] / "weights.bin")
        return bundle.commit().exception(20)

    assert job.both(act) == [None, None]
    assert_same(content(0, 1.0), torch.load(job.roots[0] / "weights.bin"))
    assert sorted(path.name for path in job.roots[0].iterdir()) == [".lock", "weights.bin"]


def test_what_others_have_written_is_made_durable(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = job.roots[0] / "a" / "offloaded" / "rank01"
    tree.mkdir(parents=True)
    for name in ("x.swp", "y.swp"):
        (tree / name).write_text(name)
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))[1])

    def act(rank: int) -> BaseException | None:
        bundle = job.begin(rank, "a", 1.0)
        if rank == 1:
            bundle.include(job.roots[1] / "a" / "offloaded")
        return bundle.commit().exception(20)

    assert job.both(act) == [None, None]
    assert {str(tree / "x.swp"), str(tree / "y.swp")} <= set(synced)
    (tree / "x.swp").unlink()
    (tree / "x.swp").symlink_to("nowhere")
    errors = job.both(act)
    assert isinstance(errors[1], StorageError) and "x.swp" in str(errors[1]) and isinstance(errors[0], PeerError)
    job.assert_found("a", 1.0)


def test_one_too_many_is_skipped(tmp_path: Path, native: Any) -> None:
    job = Job(tmp_path, when_busy="skip", max_in_flight=1)
    native.set_fault("fdatasync", delay_s=60)
    first, second = (job.both(lambda rank: job.begin(rank, name, 1.0).commit()) for name in "ab")  # noqa: B023 - used at once
    native.clear_faults()
    errors = [pending.exception(20) for pending in second]
    assert all(isinstance(error, SkippedError) for error in errors), errors
    assert [pending.exception(20) for pending in first] == [None, None]
    job.assert_found("a", 1.0)
    job.close()


# ---- finding ---------------------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_good_one_is_taken(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    for value, name in enumerate("abc"):
        assert job.save(name, float(value)) == [None, None]
    spoil(job.roots[0] / "c" / "rank_1_optim_states.pt")
    with caplog.at_level(logging.WARNING, "ckpt"):
        job.assert_found("b", 1.0, latest="c")
    assert "c' is not a good checkpoint; 'b' is taken instead" in caplog.text
    (job.roots[0] / "b" / "model_states.pt").unlink()
    job.assert_found("a", 0.0, latest="c")
    for error in job.find("b"):
        assert isinstance(error, CorruptError) and "model_states.pt" in str(error)
        assert "published there: c, a" in str(error), "it names others"
    spoil(job.roots[0] / "a" / "manifest.json")
    assert all(isinstance(error, CorruptError) for error in job.find())


def test_latest_goes_before_newer(job: Job) -> None:
    for value, name in enumerate("ab"):
        assert job.save(name, float(value)) == [None, None]
    (job.roots[0] / "latest").write_text("a")  # as a person would, to go back
    assert job.find() == ["a", "a"]


def test_what_has_no_manifest_is_taken_as_it_is(job: Job) -> None:
    (job.roots[0] / "theirs").mkdir()
    torch.save({}, job.roots[0] / "theirs" / "model_states.pt")
    (job.roots[0] / "latest").write_text("theirs\n")
    assert job.find() == ["theirs", "theirs"] and job.find("theirs") == ["theirs", "theirs"]


def test_what_was_never_completed_is_refused(job: Job, native: Any) -> None:
    assert job.save("a", 1.0) == [None, None]
    begun = job.roots[0] / "b"
    begun.mkdir()
    (begun / ".tmp-model_states.pt-00000000-1-000000000").write_bytes(b"half")
    for error in job.find("b"):
        assert isinstance(error, CorruptError) and "never completed" in str(error) and "published there: a" in str(error)
    assert job.find() == ["a", "a"]


# ---- the directory ---------------------------------------------------------------------------------------------------


def test_what_a_crash_left_is_removed_before_the_first_save(tmp_path: Path, native: Any) -> None:
    (tmp_path / "b").mkdir()
    rubbish = [tmp_path / "b" / ".tmp-x.pt-00000000-1-000000000", tmp_path / ".tmp-latest-00000000-1-000000001"]
    theirs = [tmp_path / "b" / ".tmp-mine", tmp_path / ".tmp-y.pt-00000000-1-000000000", tmp_path / "note.txt"]
    for path in [*rubbish, *theirs]:
        path.write_text("x")
    job = Job(tmp_path)
    assert job.save("a", 1.0) == [None, None]
    assert not any(path.exists() for path in rubbish) and all(path.exists() for path in theirs)
    job.close()


def test_a_second_job_is_refused_on_all_ranks(job: Job) -> None:
    holding = f"""
import ckpt, sys
from ckpt.saving import inspection
checkpointer = ckpt.BundleCheckpointer()
checkpointer.begin({str(job.roots[0])!r}, "theirs").commit().result()
print("saved", flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", holding], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "saved\n"
        errors = job.save("a", 2.0)
        assert isinstance(errors[0], InUseError) and f"process {other.pid}" in str(errors[0])
        assert isinstance(errors[1], PeerError) and "rank 0 may not save" in str(errors[1])
    assert job.save("a", 3.0) == [None, None]
    job.assert_found("a", 3.0)


def test_nodes_with_directories_of_their_own(tmp_path: Path, native: Any) -> None:
    job = Job(tmp_path, nodes=True)
    for value in (1.0, 2.0):
        assert job.save("a", value) == [None, None]
        job.assert_found("a", value)
    native.set_fault("fdatasync", path_part="node-1", error=errno.EIO)
    assert all(job.save("b", 3.0))
    native.clear_faults()
    job.assert_found("a", 2.0)
    assert not job.temporaries()
    job.close()


def test_two_models_of_one_job_share_a_directory(job: Job) -> None:
    other = Job(job.roots[0])
    assert job.save("generator", 1.0) == [None, None]
    assert other.save("critic", 2.0) == [None, None]
    other.close()
    assert job.save("generator", 3.0) == [None, None]
    job.assert_found("generator", 3.0)
    assert job.find("critic") == ["critic", "critic"]


def test_a_file_that_is_not_there_is_not_published(job: Job) -> None:
    """As on nodes with disks of their own, if nobody has said so: rank 0 does not see what rank 1 has written."""

    def act(rank: int) -> BaseException | None:
        bundle = job.begin(rank, "a", 1.0)
        if rank == 1:
            inspection.files_of(bundle.pending)[0].temporary.unlink()
        return bundle.commit().exception(20)

    errors = job.both(act)
    assert isinstance(errors[0], CorruptError) and "not all ranks see the same directory" in str(errors[0])
    assert isinstance(errors[1], PeerError)
    assert not (job.roots[0] / "latest").exists() and not (job.roots[0] / "a" / "manifest.json").exists()


def test_what_a_manifest_names_is_never_removed(tmp_path: Path, native: Any) -> None:
    job = Job(tmp_path)
    assert job.save("a", 1.0) == [None, None]
    native.set_fault("rename", path_part="rank_1", count=1, error=errno.EIO)
    assert all(job.save("b", 2.0))
    job.close()
    native.set_fault("rename", path_part="rank_1", count=1, error=errno.EIO)
    after = Job(tmp_path)
    assert after.save("c", 3.0) == [None, None], "the first save of a job cleans up"
    native.clear_faults()
    assert after.find("b") == ["b", "b"]
    assert_same(content(1, 2.0), torch.load(tmp_path / "b" / "rank_1_optim_states.pt"))
    after.close()


def test_files_that_a_living_process_writes_are_left_alone(tmp_path: Path, native: Any) -> None:
    (tmp_path / "b").mkdir()
    native.set_fault("fdatasync", path_part="mine", delay_s=0.5)
    mine = ckpt.save(content(0, 5.0), tmp_path / "b" / "mine.pt", options=options())
    job = Job(tmp_path)
    assert job.save("a", 1.0) == [None, None]
    assert_same(content(0, 5.0), torch.load(mine.result(20)))
    job.close()


def test_a_name_with_slashes(job: Job, native: Any) -> None:
    assert job.save("epoch/3", 1.0) == [None, None]
    job.assert_found("epoch/3", 1.0)
    native.set_fault("rename", path_part="rank_1", count=1, error=errno.EIO)
    assert all(job.save("epoch/3", 2.0))
    native.clear_faults()
    job.assert_found("epoch/3", 2.0)
    spoil(job.roots[0] / "epoch" / "3" / "model_states.pt")
    assert all(isinstance(error, CorruptError) for error in job.find())


def test_nodes_agree_on_latest(tmp_path: Path, native: Any) -> None:
    job = Job(tmp_path, nodes=True)
    assert job.save("a", 1.0) == [None, None]
    native.set_fault("rename", path_part="node-1/latest", count=1, error=errno.EIO)
    errors = job.save("b", 2.0)
    assert isinstance(errors[1], StorageError) and isinstance(errors[0], PeerError) and "rank 1" in str(errors[0])
    job.close()


def test_a_directory_by_two_names(job: Job) -> None:
    assert job.save("a", 1.0) == [None, None]
    other = job.roots[0].with_name(job.roots[0].name + "-link")
    other.symlink_to(job.roots[0])
    job.roots = [other, other]
    assert job.save("b", 2.0) == [None, None]
    job.assert_found("b", 2.0)


def test_a_rank_that_may_not_look_says_so(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectoryLock, "acquire", refuse)
    errors = job.save("a", 1.0)
    assert isinstance(errors[0], StorageError) and isinstance(errors[1], PeerError) and "Permission" in str(errors[1])
    monkeypatch.undo()
    assert job.save("a", 2.0) == [None, None]


def refuse(lock: DirectoryLock, timeout_s: float) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_bundle_that_is_never_committed_does_not_hold_up_the_end(tmp_path: Path, native: Any) -> None:
    checkpointer = ckpt.BundleCheckpointer(options=options(drain_timeout_s=300))
    checkpointer.begin(tmp_path, "a").save(content(0, 1.0), tmp_path / "a" / "x.pt")
    begin = time.monotonic()
    checkpointer.close()
    assert time.monotonic() - begin < patience(15)


def test_the_collector_may_close_one_at_any_moment(tmp_path: Path, native: Any) -> None:
    """Also on a thread that holds a lock which the end needs, and on the finisher's own."""
    program = f"""
import gc, ckpt
class Cycle:
    def __init__(self):
        self.me, self.checkpointer = self, ckpt.BundleCheckpointer(options=ckpt.Options(arena_bytes="1MiB", writers=1))
    def __del__(self):
        self.checkpointer.close()
gc.set_threshold(1, 1, 1)
for number in range(30):
    cycle = Cycle()
    cycle.checkpointer.begin({str(tmp_path)!r} + f"/{{number % 3}}", "a").commit()
    del cycle
print("done")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=patience(90))
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr
