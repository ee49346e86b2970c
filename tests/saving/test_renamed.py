"""Frameworks write to a directory of a temporary name and rename it as soon as save() has returned."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, Resources, assert_same, clear_faults, options, wait_until
from test_bundles import Job
from test_ranks_apart import PATIENT

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.errors import FailedSavesError, StorageError
from ckpt.storage import durable

STATE = {"weights": torch.arange(300_000)}
OLD = {"weights": torch.arange(10)}
SMALL = options()


@pytest.fixture
def saver() -> Iterator[ckpt.BundleCheckpointer]:
    with closing(ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local")) as made:
        yield made


def hold(native: Any, call: str = "pwritev") -> None:
    native.set_fault(call, delay_s=DEADLINE_S)


def begin(saver: ckpt.BundleCheckpointer, root: Path, name: str) -> ckpt.PendingSave:
    bundle = saver.begin(root, name, step=5)
    for file in ("model.pt", "optimizer.pt"):
        bundle.save(STATE, root / name / file)
    return bundle.commit()


def assert_bundle(root: Path, name: str, latest: str) -> None:
    for file in ("model.pt", "optimizer.pt"):
        assert_same(STATE, torch.load(root / name / file))
    assert manifests.names(manifests.read(root / name).files) == {"model.pt", "optimizer.pt"}
    assert (root / "latest").read_text() == latest
    assert list(root.rglob(".tmp-*")) == []


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_a_single_file(call: str, tmp_path: Path, native: Any, leaks_nothing: Resources) -> None:
    old, new = tmp_path / "tmp-checkpoint-5", tmp_path / "checkpoint-5"
    old.mkdir()
    hold(native, call)
    pending = ckpt.save(STATE, old / "model.pt", options=SMALL)
    old.rename(new)
    clear_faults()
    assert pending.result(DEADLINE_S) == new / "model.pt"
    assert_same(STATE, torch.load(new / "model.pt"))
    assert os.listdir(tmp_path) == ["checkpoint-5"] and os.listdir(new) == ["model.pt"]


def test_another_directory_of_the_same_name_is_left_alone(tmp_path: Path, native: Any) -> None:
    old, new = tmp_path / "tmp", tmp_path / "final"
    old.mkdir()
    hold(native)
    pending = ckpt.save(STATE, old / "model.pt", options=SMALL)
    old.rename(new)
    old.mkdir()
    (old / "model.pt").write_text("somebody else's")
    clear_faults()
    assert pending.result(DEADLINE_S) == new / "model.pt"
    assert_same(STATE, torch.load(new / "model.pt"))
    assert os.listdir(old) == ["model.pt"] and (old / "model.pt").read_text() == "somebody else's"


def test_what_fails_is_removed_where_it_is(tmp_path: Path, native: Any) -> None:
    old, new = tmp_path / "tmp", tmp_path / "final"
    old.mkdir()
    hold(native, "fdatasync")
    native.set_fault("rename", error=5)
    pending = ckpt.save(STATE, old / "model.pt", options=SMALL)
    old.rename(new)
    native.clear_faults("fdatasync")
    error = pending.exception(DEADLINE_S)
    assert isinstance(error, StorageError) and str(new / "model.pt") in str(error)
    assert os.listdir(new) == []


def test_a_single_file_whose_directory_is_removed(tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    hold(native)
    pending = ckpt.save(STATE, directory / "model.pt", options=SMALL)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    clear_faults()
    error = pending.exception(DEADLINE_S)
    assert isinstance(error, StorageError) and str(directory) in str(error) and "removed?" in str(error)
    assert logging.ERROR in {record.levelno for record in caplog.records}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["open", "pwritev", "fdatasync"])
def test_the_directory_of_a_bundle(call: str, saver: ckpt.BundleCheckpointer, tmp_path: Path, native: Any) -> None:
    """The second time files are created in the background."""
    for step in (5, 6):
        old, new = tmp_path / f"tmp-checkpoint-{step}", tmp_path / f"checkpoint-{step}"
        native.set_fault(call, ".tmp-" if call != "open" or step == 6 else "no such", delay_s=DEADLINE_S)
        pending = begin(saver, tmp_path, old.name)
        old.rename(new)
        clear_faults()
        assert pending.result(DEADLINE_S) == new
        assert_bundle(tmp_path, new.name, new.name)
        assert not old.exists()
        assert saver.find(tmp_path) == new.name


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_the_root_of_a_bundle(call: str, saver: ckpt.BundleCheckpointer, tmp_path: Path, native: Any) -> None:
    """Under the same name there is another one the next time, which is locked anew."""
    old = tmp_path / "tmp-checkpoint"
    for step in (5, 6, 7):
        new = tmp_path / f"checkpoint-{step}"
        hold(native, call)
        pending = begin(saver, old, f"global_step{step}")
        old.rename(new)
        clear_faults()
        assert pending.result(DEADLINE_S) == new / f"global_step{step}"
        assert_bundle(new, f"global_step{step}", f"global_step{step}")
        assert not old.exists()
        assert saver.find(new) == f"global_step{step}"


def test_a_bundle_of_two_ranks(tmp_path: Path, native: Any) -> None:
    job = Job(tmp_path)
    hold(native)
    pending = job.both(lambda rank: job.begin(rank, "tmp", 1.0).commit())
    (tmp_path / "tmp").rename(tmp_path / "final")
    clear_faults()
    assert [each.result(DEADLINE_S) for each in pending] == [tmp_path / "final"] * 2
    job.assert_found("final", 1.0)
    assert not (tmp_path / "tmp").exists()
    job.close()


def test_a_bundle_that_fails_in_a_renamed_directory_counts(tmp_path: Path, native: Any) -> None:
    with closing(ckpt.BundleCheckpointer(options=options(max_failed_saves=1, **PATIENT), coordinator="local")) as saver:
        native.set_fault("fdatasync", delay_s=DEADLINE_S)
        native.set_fault("rename", error=2)
        pending = begin(saver, tmp_path, "tmp")
        (tmp_path / "tmp").rename(tmp_path / "final")
        native.clear_faults("fdatasync")
        assert isinstance(pending.exception(DEADLINE_S), StorageError)
        clear_faults()
        with pytest.raises(FailedSavesError):
            saver.begin(tmp_path, "next")
        with pytest.raises(StorageError):
            saver.wait()
        begin(saver, tmp_path, "next").result(DEADLINE_S)


@pytest.mark.parametrize("how", ["renamed to '.*final'", "removed"])
def test_steps_fail_loudly(how: str, tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "run"
    checkpointer = ckpt.Checkpointer(directory, options=options(max_failed_saves=2))
    checkpointer.save(1, OLD).result(DEADLINE_S)
    hold(native)
    pending = checkpointer.save(2, STATE)
    wait_until(lambda: bool(list(directory.glob("step-*2/.tmp-*"))))
    directory.rename(tmp_path / "final")
    if how == "removed":
        shutil.rmtree(tmp_path / "final")
    clear_faults()
    for save in (pending, checkpointer.save(3, STATE)):
        with pytest.raises(StorageError, match=f"run' was {how}"):
            save.result(DEADLINE_S)
    assert logging.ERROR in {record.levelno for record in caplog.records}
    with pytest.raises(FailedSavesError):
        checkpointer.save(4, STATE)
    assert [path for path in directory.rglob("*") if path.is_file()] == []
    with pytest.raises(StorageError, match=f"run' was {how}"):
        checkpointer.close()


def test_steps_go_on_when_the_directory_has_its_name_again(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with ckpt.Checkpointer(directory, options=SMALL) as checkpointer:
        checkpointer.save(1, OLD).result(DEADLINE_S)
        directory.rename(tmp_path / "away")
        assert isinstance(checkpointer.save(2, STATE).exception(DEADLINE_S), StorageError)
        shutil.rmtree(directory, ignore_errors=True)
        (tmp_path / "away").rename(directory)
        checkpointer.save(3, STATE).result(DEADLINE_S)
        found = checkpointer.restore()
        assert found is not None and found.step == 3
        assert_same(STATE, found.state)


def test_descriptors_stay_few(tmp_path: Path, leaks_nothing: Resources, saver: ckpt.BundleCheckpointer) -> None:
    """Also where the caller keeps what save() has returned."""
    kept = []
    for number in range(30):
        kept.append(ckpt.save(OLD, tmp_path / "model.pt", options=SMALL))
        kept.append(begin(saver, tmp_path, f"b{number % 3}"))
        kept[-1].result(DEADLINE_S)
        kept[-2].result(DEADLINE_S)
        if number == 2:
            before = len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) <= before
    saver.close()


def test_a_directory_that_was_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finalizer runs all the same."""
    failed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    durable.Directory.__new__(durable.Directory)
    with pytest.raises(StorageError):
        durable.Directory(tmp_path / "missing")
    gc.collect()
    assert failed == []
