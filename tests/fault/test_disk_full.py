"""A disk that is really full: a small tmpfs, and a small ext4 image, where this machine allows mounting them."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mounting import fill, mounted
from support import assert_same, options, wait_until

import ckpt
from ckpt.errors import StorageError

DISK_BYTES = 8 << 20


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with mounted(request.param, tmp_path / "disk", DISK_BYTES) as place:
        yield place


def make_state(step: int, mebibytes: int = 2) -> dict[str, torch.Tensor]:
    return {"weights": torch.full((mebibytes, 256, 1024), float(step))}


@pytest.mark.parametrize("leave_bytes", [0, 64 << 10, 1 << 20])
def test_the_disk_fills_up(small_disk: Path, leave_bytes: int) -> None:
    run = small_disk / "run"
    with ckpt.Checkpointer(run, options=options()) as checkpointer:
        checkpointer.save(1, make_state(1)).result(30)
        ballast = fill(small_disk, leave_bytes)
        for step in (2, 3):
            error = checkpointer.save(step, make_state(step)).exception(30)  # save() itself must not raise
            assert isinstance(error, StorageError) and error.errno == errno.ENOSPC
            assert "free space" in str(error)
            assert (run / "latest").read_text().strip() == "step-000000000001"
            found = checkpointer.restore()
            assert found is not None and found.step == 1
            assert_same(make_state(1), found.state)
        wait_until(lambda: len(list(run.glob("step-*"))) == 1, what="the removal of the failed steps")
        ballast.unlink()
        checkpointer.save(4, make_state(4)).result(30)
        assert checkpointer.steps() == [1, 4]
        found = checkpointer.restore()
        assert found is not None
        assert_same(make_state(4), found.state)


def test_a_run_that_outgrows_the_disk_keeps_what_fits(small_disk: Path) -> None:
    outcomes = []
    with ckpt.Checkpointer(small_disk / "run", keep=None, options=options(max_failed_saves=0)) as checkpointer:
        for step in range(6):
            pending = checkpointer.save(step, make_state(step))
            outcomes.append(pending.exception(30) is None)
            if outcomes[-1]:
                assert_same(make_state(step), ckpt.load(pending.result() / "state.pt"))
        assert outcomes[0] and not outcomes[-1]
        assert len(checkpointer.steps()) == outcomes.count(True)
        assert checkpointer.save(7, {"small": torch.zeros(4)}).exception(30) is None
    with ckpt.Checkpointer(small_disk / "run", keep=1, options=options()) as checkpointer:
        checkpointer.save(8, {"small": torch.ones(4)}).result(30)
        assert checkpointer.steps() == [8]
        checkpointer.save(9, make_state(9)).result(30)


def test_what_is_removed_makes_room_for_the_next_save(small_disk: Path, native: Any) -> None:
    """Though removing takes long, and may go on behind the outcome of a save: here there is no room for that."""
    with ckpt.Checkpointer(small_disk / "run", keep=1, options=options()) as checkpointer:
        for step in range(4):
            native.set_fault("unlink", delay_s=0.3)
            checkpointer.save(step, make_state(step, mebibytes=3)).result(30)
            assert checkpointer.steps() == [step]


def test_what_is_replaced_makes_room_for_the_next_save(small_disk: Path, native: Any) -> None:
    path = small_disk / "model.pt"
    for step in range(4):
        pending = ckpt.save(make_state(step, mebibytes=3), path, options=options())
        pending.add_done_callback(lambda _: time.sleep(0.3))  # what is done behind the outcome comes after this
        pending.result(30)
    assert_same(make_state(3, mebibytes=3), ckpt.load(path))


def test_a_single_file_is_replaced_or_left_alone(small_disk: Path) -> None:
    path = small_disk / "model.pt"
    ckpt.save(make_state(1, mebibytes=4), path, options=options()).result(30)
    error = ckpt.save(make_state(2, mebibytes=5), path, options=options()).exception(30)
    assert isinstance(error, StorageError) and error.errno == errno.ENOSPC
    assert_same(make_state(1, mebibytes=4), ckpt.load(path))
    assert [entry.name for entry in small_disk.iterdir() if entry.is_file()] == ["model.pt"]
