"""Bundles whose directory gets its name when all of it is durable: who lists the directory never meets half a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery, shared_nursery
from support import DEADLINE_S, assert_same, clear_faults, options, wait_until
from test_bundles import FILES, Job, content
from test_ranks_apart import PATIENT

import ckpt
from ckpt.directory import late_names
from ckpt.errors import CheckpointError, InUseError, PeerError, StorageError

LOCKS = (".lock", ".names.lock")
CRASH_POINTS = (
    *("manifest-written", "manifest-renamed", "published", "placed", "all-placed"),
    *("bundle-exchanged", "bundle-retired", "bundle-named"),
)


class LateJob(Job):
    """As frameworks do it, with a file of their own beside ours."""

    def begin(self, rank: int, name: str, value: float, **how: Any) -> Any:
        bundle = self.ranks[rank].begin(self.roots[rank], name, named_last=True, move_latest=False, **how)
        for file in FILES[rank:]:
            bundle.save(content(rank, value), bundle.directory / file.format(rank=rank))
        (bundle.directory / f"notes-{rank}.json").write_text(str(value))
        bundle.include(bundle.directory)
        return bundle

    def assert_there(self, name: str, value: float) -> None:
        for rank in range(2):
            for file in FILES[rank:]:
                assert_same(content(rank, value), torch.load(self.roots[rank] / name / file.format(rank=rank)))
            assert (self.roots[rank] / name / f"notes-{rank}.json").read_text() == str(value)
        assert self.find(name) == [name, name]

    def left_over(self) -> list[Path]:
        return [path for root in {*self.roots} for path in root.rglob(".*") if path.name not in LOCKS]


@pytest.fixture(params=[{}], ids=[""])
def job(request: pytest.FixtureRequest, tmp_path: Path, native: Any) -> Iterator[LateJob]:
    job = LateJob(tmp_path, **request.param)
    yield job
    native.clear_faults()
    job.close()


@pytest.mark.parametrize("name", ["checkpoint-1", "checkpoints/checkpoint_1", "100% good/50%2F"])
def test_the_name_comes_last(name: str, job: LateJob, native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    pending = job.both(lambda rank: job.begin(rank, name, 1.0).commit())
    wait_until(lambda: bool(job.temporaries()))
    assert not (tmp_path / name).exists()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    clear_faults()
    assert [each.result(60) for each in pending] == [tmp_path / name] * 2
    job.assert_there(name, 1.0)
    assert job.left_over() == []


def test_what_has_the_name_is_replaced_as_a_whole(job: LateJob, native: Any, tmp_path: Path) -> None:
    assert job.save("a", 1.0) == [None, None]
    (tmp_path / "a" / "model-00002-of-00002.safetensors").write_text("of the former one")
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    pending = job.both(lambda rank: job.begin(rank, "a", 2.0).commit())
    wait_until(lambda: bool(job.temporaries()))
    assert_same(content(0, 1.0), torch.load(tmp_path / "a" / FILES[0]))
    assert (tmp_path / "a" / "notes-0.json").read_text() == "1.0"
    clear_faults()
    assert [each.exception(60) for each in pending] == [None, None]
    job.assert_there("a", 2.0)
    assert not (tmp_path / "a" / "model-00002-of-00002.safetensors").exists()
    assert job.left_over() == []


def test_a_second_save_of_a_name_waits_for_the_first(job: LateJob, tmp_path: Path) -> None:
    pending = [job.both(lambda rank, value=value: job.begin(rank, "a", value).commit()) for value in (1.0, 2.0)]
    assert [each.exception(60) for both in pending for each in both] == [None] * 4
    job.assert_there("a", 2.0)


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_what_has_failed_goes(call: str, job: LateJob, native: Any, tmp_path: Path) -> None:
    assert job.save("a", 1.0) == [None, None]
    native.set_fault(call, error=errno.EIO)
    assert all(isinstance(error, CheckpointError) for error in job.save("a", 2.0))
    assert all(isinstance(error, CheckpointError) for error in job.save("b", 2.0))
    clear_faults()
    assert job.left_over() == [] and not (tmp_path / "b").exists()
    job.assert_there("a", 1.0)
    assert job.save("b", 3.0) == [None, None]
    job.assert_there("b", 3.0)


def test_a_name_that_cannot_be_given_is_given_later(job: LateJob, native: Any, tmp_path: Path) -> None:
    """The manifest has decided: the next who looks sees to the rest."""
    real = job.ranks[0]._roots.claim

    def claim(*args: Any, **how: Any) -> Any:
        own = real(*args, **how)
        own.give_name = lambda name: (_ for _ in ()).throw(StorageError(errno.EIO, "no name today", name))
        return own

    job.ranks[0]._roots.claim = claim
    errors = job.save("a", 1.0)
    assert isinstance(errors[0], StorageError) and isinstance(errors[1], PeerError), errors
    assert not (tmp_path / "a").exists() and len(job.left_over()) == 1
    job.assert_there("a", 1.0) if job.find("a") == ["a", "a"] else pytest.fail("it has no name")
    assert job.left_over() == []


def test_what_is_no_directory_is_not_replaced(job: LateJob, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file of the user")
    with pytest.raises(StorageError, match="it is no directory; remove it"):
        raise job.save("a", 1.0)[0]
    assert (tmp_path / "a").read_text() == "a file of the user"
    assert job.save("b", 1.0) == [None, None]


def test_two_savers_do_not_write_one_name(tmp_path: Path, native: Any) -> None:
    first, second = (ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local") for _ in range(2))
    with first, second:
        bundle = first.begin(tmp_path, "a", named_last=True)
        bundle.save(content(0, 1.0), bundle.directory / "x.pt")
        with pytest.raises(InUseError, match="is being saved already"):
            second.begin(tmp_path, "a", named_last=True)
        assert bundle.commit().result(60) == tmp_path / "a"
        second.begin(tmp_path, "a", named_last=True).commit().result(60)


def test_what_a_user_hides_is_left_alone(tmp_path: Path, native: Any) -> None:
    for name in (".partial", "lazyckpt-a.partial", ".lazyckpt-b"):
        (tmp_path / name).mkdir()
    with ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local") as saver:
        bundle = saver.begin(tmp_path, "a", named_last=True)
        bundle.save(content(0, 1.0), bundle.directory / "x.pt")
        bundle.commit().result(60)
    assert all((tmp_path / name).is_dir() for name in (".partial", "lazyckpt-a.partial", ".lazyckpt-b"))


# ---- killed ----------------------------------------------------------------------------------------------------------


def save_until_killed(root: str, point: str, name: str) -> None:
    """In a process of its own: the second save of a name comes to the point."""
    with ckpt.BundleCheckpointer(coordinator="local") as saver:
        if point == "bundle-retired":
            late_names.exchange = lambda one, other: False
        for value in (1.0, 2.0):
            bundle = saver.begin(root, name, named_last=True, move_latest=False)
            bundle.save(content(0, value), bundle.directory / "x.pt")
            (bundle.directory / "notes.json").write_text(str(value))
            bundle.include(bundle.directory)
            pending = bundle.commit()
            if value == 1.0:
                pending.result(60)
                ckpt._native.set_crash_point(point, 0)
        pending.result(60)
    os._exit(0)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with shared_nursery() as nursery:
        yield nursery


@pytest.mark.parametrize("name", ["a", "deep/a"])
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_crash_leaves_the_old_one_or_the_new_one(point: str, name: str, nursery: Nursery, tmp_path: Path) -> None:
    child = nursery.start(f"import test_late_names as t; t.save_until_killed({str(tmp_path)!r}, {point!r}, {name!r})")
    ended = child.wait()
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    decided = point not in ("manifest-written",)
    if (tmp_path / name).exists():  # what a program that knows nothing of manifests finds is whole
        value = float((tmp_path / name / "notes.json").read_text())
        assert_same(content(0, value), torch.load(tmp_path / name / "x.pt"))
    with ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local") as saver:
        assert saver.find(tmp_path, name) == name
        expected = 2.0 if decided else 1.0
        assert_same(content(0, expected), torch.load(tmp_path / name / "x.pt"))
        assert (tmp_path / name / "notes.json").read_text() == str(expected)
        bundle = saver.begin(tmp_path, "next", named_last=True)
        bundle.save(content(0, 3.0), bundle.directory / "x.pt")
        bundle.commit().result(60)
        assert_same(content(0, expected), torch.load(tmp_path / name / "x.pt"))
    assert [path.name for path in tmp_path.rglob(".*") if path.name not in LOCKS] == []


def test_what_was_saved_by_others_meanwhile_is_left_alone(nursery: Nursery, tmp_path: Path) -> None:
    """A crash came when the new one had no name yet; then somebody who knows nothing of it has written under the name."""
    child = nursery.start(f"import test_late_names as t; t.save_until_killed({str(tmp_path)!r}, 'all-placed', 'a')")
    assert child.wait().returncode == -signal.SIGKILL
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    torch.save(content(0, 5.0), tmp_path / "a" / "x.pt")
    with ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local") as saver:
        assert saver.find(tmp_path, "a") == "a"
        assert_same(content(0, 5.0), torch.load(tmp_path / "a" / "x.pt"))
        bundle = saver.begin(tmp_path, "a", named_last=True, move_latest=False)
        assert_same(content(0, 5.0), torch.load(tmp_path / "a" / "x.pt"))
        bundle.save(content(0, 6.0), bundle.directory / "x.pt")
        bundle.commit().result(60)
        assert saver.find(tmp_path, "a") == "a"
        assert_same(content(0, 6.0), torch.load(tmp_path / "a" / "x.pt"))
    assert [path.name for path in tmp_path.rglob(".*") if path.name not in LOCKS] == []


def test_the_old_one_does_not_come_back_whatever_the_clock_says(nursery: Nursery, tmp_path: Path) -> None:
    """A crash came when the two had changed places; then somebody has copied the directory, the old one last."""
    child = nursery.start(f"import test_late_names as t; t.save_until_killed({str(tmp_path)!r}, 'bundle-exchanged', 'a')")
    assert child.wait().returncode == -signal.SIGKILL
    later = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(late_names.partial_of(tmp_path, "a") / "manifest.json", ns=(later, later))
    with ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local") as saver:
        assert saver.find(tmp_path, "a") == "a"
    assert_same(content(0, 2.0), torch.load(tmp_path / "a" / "x.pt"))
    assert [path.name for path in tmp_path.rglob(".*") if path.name not in LOCKS] == []


def look_until_told(root: str) -> None:
    """In a process of its own: asks for the bundle again and again, and gives it its name if it comes to that."""
    with ckpt.BundleCheckpointer(coordinator="local") as saver:
        found = 0
        while not Path(root, "enough").exists():
            with contextlib.suppress(CheckpointError):  # it was replaced each time that it was looked at
                found += saver.find(Path(root), "a") == "a"
        os.write(1, f"found {found}\n".encode())
    os._exit(0)


def test_who_looks_does_not_come_between(nursery: Nursery, tmp_path: Path) -> None:
    """Both may be about to give the name; nothing is lost by that, and each save says what came of it."""
    with ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local") as saver:
        child = nursery.start(f"import test_late_names as t; t.look_until_told({str(tmp_path)!r})")
        for value in range(150):
            bundle = saver.begin(tmp_path, "a", named_last=True, move_latest=False)
            bundle.save({"value": value}, bundle.directory / "x.pt")
            assert bundle.commit().result(60) == tmp_path / "a"
            assert torch.load(tmp_path / "a" / "x.pt") == {"value": value}
        (tmp_path / "enough").touch()
        ended = child.wait()
        assert ended.returncode == 0 and ended.stdout.startswith("found "), ended.stderr
    assert [path.name for path in tmp_path.rglob(".*") if path.name not in LOCKS] == []


def test_an_interrupted_begin_gives_the_name_back(tmp_path: Path, native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C in a notebook, which goes on."""
    with ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local") as saver:
        with monkeypatch.context() as patch:
            patch.setattr(saver._finisher, "admit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                saver.begin(tmp_path, "a", named_last=True)
        wait_until(lambda: not late_names.partial_of(tmp_path, "a").exists())
        bundle = saver.begin(tmp_path, "a", named_last=True)
        bundle.save(content(0, 1.0), bundle.directory / "x.pt")
        assert bundle.commit().result(60) == tmp_path / "a"


def test_beside_others_nothing_is_tidied(tmp_path: Path, native: Any) -> None:
    """The directory may hold those of other jobs, on other hosts too."""
    theirs = tmp_path / "run9" / ".tmp-x.pt-00000000-1-000000000"
    theirs.parent.mkdir()
    theirs.write_text("x")
    with ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local") as saver:
        bundle = saver.begin(tmp_path, "run1/state", named_last=True)
        bundle.save(content(0, 1.0), bundle.directory / "x.pt")
        bundle.commit().result(60)
    assert theirs.exists()
