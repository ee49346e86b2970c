"""Reading beside a job that saves, and removes what is old: what goes meanwhile is not damaged."""

from __future__ import annotations

import concurrent.futures
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, options
from test_ranks_apart import PATIENT, Threaded, Wire

import ckpt
from ckpt.bundles import BundleCheckpointer
from ckpt.directory import steps
from ckpt.errors import CheckpointError, CorruptError


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((50_000,), float(step))}


class Job:
    """Saves a step and removes the one before, whenever a reader has looked, as often as it is told to."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checkpointer = ckpt.Checkpointer(directory, keep=1, options=options(), coordinator="local")
        self.times, self.step = 0, 0
        self.save()
        look = steps.find_steps

        def look_and_save(root: Path) -> Any:
            found = look(root)
            if self.times > 0 and threading.current_thread().name != "ckpt-committer":
                self.times -= 1
                self.save()
            return found

        monkeypatch.setattr(steps, "find_steps", look_and_save)

    def save(self) -> None:
        self.step += 1
        self.checkpointer.save(self.step, state(self.step)).result(DEADLINE_S)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    job = Job(tmp_path, monkeypatch)
    with job.checkpointer:
        yield job


@pytest.mark.parametrize("into", [False, True])
def test_the_newest_is_taken(into: bool, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job.times = 3
    target = {"step": 0, "weights": torch.zeros(50_000)} if into else None
    with ckpt.Checkpointer(tmp_path, options=options()) as reader:
        found = reader.restore(into=target)
    assert found is not None and found.step == found.state["step"] == job.step == 4
    assert torch.equal(found.state["weights"], torch.full((50_000,), 4.0))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_several_ranks(job: Job, tmp_path: Path) -> None:
    job.times = 2
    job.checkpointer.close()
    wire = Wire()
    ranks = [ckpt.Checkpointer(tmp_path, options=options(**PATIENT), coordinator=Threaded(wire, rank)) for rank in range(2)]
    job.times, job.checkpointer = 2, ckpt.Checkpointer(tmp_path, keep=1, options=options(), coordinator="local")
    with job.checkpointer, concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: rank.restore(merge=lambda states: states[0]), ranks))
        assert [each and (each.step, each.state["step"]) for each in found] == [(3, 3)] * 2
    for rank in ranks:
        rank.close()


def test_one_that_never_comes_to_an_end_says_so(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.restore.candidates._MOST_LOOKS", 5)
    job.times = 1000
    with (
        ckpt.Checkpointer(tmp_path, options=options()) as reader,
        pytest.raises(CheckpointError, match=r"was removed or replaced while.*keeps only 1 checkpoints") as caught,
    ):
        reader.restore()
    assert not isinstance(caught.value, CorruptError)


def test_a_file_that_is_missing_while_its_manifest_stands_is_damage(job: Job, tmp_path: Path) -> None:
    (tmp_path / f"step-{job.step:012d}" / "state.pt").unlink()
    with ckpt.Checkpointer(tmp_path, options=options()) as reader, pytest.raises(CorruptError, match="No such file"):
        reader.restore()


def when_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Before the first file of a bundle is verified."""
    from ckpt.restore import file_readers

    verify, acted = file_readers.verify, []

    def verify_after(*args: Any) -> None:
        if not acted:
            acted.append(True)
            act()
        verify(*args)

    monkeypatch.setattr(file_readers, "verify", verify_after)


def test_a_bundle_that_is_saved_again_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(checkpointer: BundleCheckpointer, name: str, value: int) -> None:
        bundle = checkpointer.begin(tmp_path, name)
        bundle.save({"value": value, "weights": torch.ones(1000 * value)}, tmp_path / name / "model.pt")
        bundle.commit().result(DEADLINE_S)

    with BundleCheckpointer(options=options()) as job, BundleCheckpointer(options=options()) as reader:
        save(job, "one", 1)
        with monkeypatch.context() as patch:
            when_read(patch, lambda: save(job, "one", 2))
            assert reader.find(tmp_path) == "one"
        save(job, "two", 3)
        with monkeypatch.context() as patch:
            when_read(patch, lambda: (save(job, "three", 4), shutil.rmtree(tmp_path / "two"))[0])
            assert reader.find(tmp_path) == "three"


def test_a_file_that_is_replaced_while_it_is_loaded(tmp_path: Path) -> None:
    path, done = tmp_path / "model.pt", threading.Event()
    ckpt.save(state(0), path, options=options()).result(DEADLINE_S)

    def replace() -> None:
        try:
            for step in range(1, 60):
                ckpt.save(state(step), path, options=options()).result(DEADLINE_S)
        finally:
            done.set()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        saving = pool.submit(replace)
        while not done.is_set():
            found = ckpt.load(path)
            assert torch.equal(found["weights"], torch.full((50_000,), float(found["step"])))
        saving.result(DEADLINE_S)
