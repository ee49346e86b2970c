"""Step directories without a manifest: what a dead save left is cleaned up, what may be somebody's checkpoint never is."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, clear_faults, options, wait_until

import ckpt
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError
from ckpt.integrations.torch import CheckpointCallback
from ckpt.storage import temporary_names


def make(directory: Path, keep: int | None = None) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, keep=keep, options=options())


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((50_000,), float(step))}


def save(checkpointer: ckpt.Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, state(step)).result(DEADLINE_S)


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step-{step:012d}"


def lose(directory: Path, *steps: int) -> dict[Path, bytes]:
    """The manifests of these steps; returns what the other files hold."""
    for step in steps:
        (step_directory(directory, step) / "manifest.json").unlink()
    return {path: path.read_bytes() for step in steps for path in step_directory(directory, step).iterdir()}


def assert_there(files: dict[Path, bytes]) -> None:
    assert files and {path: path.read_bytes() for path in files} == files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with make(tmp_path) as checkpointer:
        save(checkpointer, 1, 2, 3)
    return tmp_path


def test_all_manifests_are_lost(saved: Path) -> None:
    files = lose(saved, 1, 2, 3)
    with make(saved) as checkpointer:
        with pytest.raises(NotACheckpointError, match=r"3 step directories without manifest\.json.*fresh=True") as caught:
            checkpointer.restore()
        assert "step-000000000002" in str(caught.value) and "nothing was resumed" in str(caught.value)
        save(checkpointer, 7)
        assert checkpointer.steps() == [7]
    assert_there(files)


def test_the_callback_does_not_begin_at_0_unless_told_to(saved: Path, native: Any) -> None:
    files = lose(saved, 1, 2, 3)
    model = torch.nn.Linear(4, 4)
    with CheckpointCallback(saved, model=model, keep=1, options=options()) as callback:
        with pytest.raises(NotACheckpointError, match="3 step directories"):
            callback.resume()
        assert callback.resume(fresh=True) == 0
        for step in (1, 2, 3, 4):  # the same steps again, and each retires the one before
            callback.save(step).result(DEADLINE_S)
            assert_there(files)
        assert callback.checkpointer.steps() == [4]
        assert callback.resume() == 4
    with make(saved, keep=1) as checkpointer:  # nor does the next job remove them
        checkpointer.restore()
        save(checkpointer, 3, 5)
        assert checkpointer.steps() == [5]
    assert_there(files)


@pytest.mark.parametrize(("lost", "found"), [(3, 2), (2, 3)])
def test_one_manifest_is_lost(lost: int, found: int, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = lose(saved, lost)
    caplog.clear()
    with make(saved) as checkpointer:
        restored = checkpointer.restore()
        assert restored is not None and restored.step == found
        warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warned) == 1 and step_directory(saved, lost).name in warned[0]
        save(checkpointer, lost, 9)
        restored = checkpointer.restore()
        assert restored is not None and restored.step == 9
    assert_there(files)


def test_a_damaged_one_is_no_reason_to_begin_anew(saved: Path) -> None:
    lose(saved, 1, 2)
    os.truncate(step_directory(saved, 3) / "state.pt", 1000)
    with make(saved) as checkpointer:
        with pytest.raises(CorruptError, match=r"step-000000000003.*2 step directories without"):
            checkpointer.restore()
        with pytest.raises(CorruptError, match="step-000000000003"):
            checkpointer.restore(fresh=True)


def test_a_copy_that_is_still_arriving(saved: Path) -> None:
    arriving = step_directory(saved, 8)
    arriving.mkdir()
    files = {arriving / "state.pt": b"half of it", arriving / ".state.pt.Xa5dQz": b"on its way"}
    for path, content in files.items():
        path.write_bytes(content)
    with make(saved, keep=1) as checkpointer:
        assert checkpointer.restore() is not None
        save(checkpointer, 8, 9)
        assert checkpointer.steps() == [9]
    assert_there(files)


def test_a_file_that_arrives_meanwhile_is_not_replaced(tmp_path: Path, native: Any) -> None:
    with make(tmp_path) as checkpointer:
        save(checkpointer, 1)
        arriving = step_directory(tmp_path, 2)
        arriving.mkdir()
        (arriving / "state.pt").write_bytes(b"mine")
        with pytest.raises(CheckpointError, match="put there from elsewhere"):
            checkpointer.save(2, state(2)).result(DEADLINE_S)
        assert (arriving / "state.pt").read_bytes() == b"mine"
        save(checkpointer, 3)
        assert checkpointer.steps() == [1, 3]


@pytest.mark.parametrize("finished", [True, False])
def test_what_a_dead_save_left_is_nobodys(finished: bool, tmp_path: Path) -> None:
    """Its first one: the job begins at 0, and without a word of complaint."""
    left = step_directory(tmp_path, 1)
    left.mkdir()
    temporary_names.temporary_path(left / "state.pt").write_bytes(b"half")
    if finished:
        (left / "rank-00001.pt").write_bytes(b"whole")
        temporary_names.temporary_path(left / "manifest.json").write_bytes(b"")
    with make(tmp_path) as checkpointer:
        assert checkpointer.restore() is None
        save(checkpointer, 2)
    assert not left.exists()


def test_a_failed_publication_leaves_nothing(tmp_path: Path, native: Any) -> None:
    with ckpt.Checkpointer(tmp_path, options=options(max_failed_saves=0)) as checkpointer:
        native.set_fault("fsync", path_part="manifest.json", error=5)
        assert checkpointer.save(1, state(1)).exception(DEADLINE_S) is not None
        native.clear_faults()
        assert not step_directory(tmp_path, 1).exists()
        save(checkpointer, 1)
        assert sorted(os.listdir(step_directory(tmp_path, 1))) == ["manifest.json", "state.pt"]


def test_a_file_that_is_removed_before_it_is_published(tmp_path: Path, native: Any) -> None:
    file = step_directory(tmp_path, 1) / "state.pt"
    with make(tmp_path) as checkpointer:
        native.set_fault("fsync", file.parent.name, delay_s=DEADLINE_S)
        pending = checkpointer.save(1, state(1))
        wait_until(file.exists)
        file.unlink()
        clear_faults()
        error = pending.exception(DEADLINE_S)
        assert isinstance(error, CorruptError) and str(file) in str(error)
        save(checkpointer, 2)
        assert checkpointer.steps() == [2]
