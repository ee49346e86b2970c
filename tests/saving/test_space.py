"""The space of old checkpoints is given back behind the outcome of the save: file systems take their time for that."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, clear_faults, options, somebody_is_in, wait_until

import ckpt
from ckpt.directory import unpublished
from ckpt.storage import temporary_names

STATE = {"weights": torch.arange(50_000)}
pytestmark = pytest.mark.usefixtures("native")


def step_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def stop_removing(native: Any) -> None:
    native.set_fault("unlink", delay_s=DEADLINE_S)


def test_nobody_waits_for_the_removal_of_an_old_step(tmp_path: Path, native: Any) -> None:
    with ckpt.Checkpointer(tmp_path, keep=1, options=options()) as checkpointer:
        checkpointer.save(1, STATE).result(DEADLINE_S)
        stop_removing(native)
        checkpointer.save(2, STATE).result(DEADLINE_S)
        checkpointer.wait(DEADLINE_S)
        assert checkpointer.steps() == [2]
        assert [name.startswith(".tmp-step-000000000001") for name in step_names(tmp_path)] == [True, False]
        clear_faults()
    assert step_names(tmp_path) == ["step-000000000002"], "close() leaves nothing behind"


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_the_next_save_has_the_space(tmp_path: Path, native: Any, when_busy: str) -> None:
    """It waits until it is free, and is not skipped."""
    with ckpt.Checkpointer(tmp_path, keep=1, options=options(max_in_flight=1, when_busy=when_busy)) as checkpointer:
        checkpointer.save(1, STATE).result(DEADLINE_S)
        stop_removing(native)
        checkpointer.save(2, STATE).result(DEADLINE_S)
        saved: list[ckpt.PendingSave] = []
        thread = threading.Thread(target=lambda: saved.append(checkpointer.save(3, STATE)))
        thread.start()
        step = tmp_path / "step-000000000003"
        wait_until(lambda: somebody_is_in("admit"))
        assert not step.exists() and not saved
        clear_faults()
        thread.join(DEADLINE_S)
        assert saved[0].result(DEADLINE_S) == step
        wait_until(lambda: step_names(tmp_path) == [step.name])


def replaced(path: Path) -> list[str]:
    """Descriptors of this process that keep the space of a file that had this name."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [link for link in links if os.path.islink(link) and os.readlink(link) == f"{path} (deleted)"]


def test_nobody_waits_for_the_space_of_a_file_that_is_replaced(tmp_path: Path, native: Any) -> None:
    path = tmp_path / "a.pt"
    seen: list[int] = []

    def look(_: ckpt.PendingSave) -> None:
        """With the outcome, before the space is given back."""
        seen.append(len(replaced(path)))

    ckpt.save(STATE, path, options=options()).result(DEADLINE_S)
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    pending = ckpt.save(STATE, path, options=options())
    pending.add_done_callback(look)
    clear_faults()
    pending.result(DEADLINE_S)
    wait_until(lambda: bool(seen))
    assert seen == [1]
    wait_until(lambda: not replaced(path))


def test_a_callback_may_save(tmp_path: Path, native: Any) -> None:
    """On the thread that would give the place free."""
    one = options(max_in_flight=1)
    second: list[ckpt.PendingSave] = []
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    pending = ckpt.save(STATE, tmp_path / "a.pt", options=one)
    pending.add_done_callback(lambda _: second.append(ckpt.save(STATE, tmp_path / "b.pt", options=one)))
    clear_faults()
    wait_until(lambda: bool(second), 10)
    assert second[0].result(DEADLINE_S) == tmp_path / "b.pt"


def test_what_a_crash_left_gives_its_space_back_before_a_byte_is_written(
    tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / "step-000000000007"
    left.mkdir()
    (left / "state.pt").write_bytes(b"half")
    unpublished.mark_of(left, temporary_names.shared_token(7)).touch()
    native.set_fault("fallocate", delay_s=DEADLINE_S)
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, STATE)
        assert step_names(tmp_path) == ["step-000000000001"]
        clear_faults()
    assert not caplog.records
