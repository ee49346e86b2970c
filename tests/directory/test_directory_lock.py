"""One directory belongs to one job: who else wants to save into it is told so."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE_S, options, patience, somebody_is_in, wait_until

import ckpt
from ckpt.errors import CheckpointError, InUseError
from ckpt.storage import durable, temporary_names


def make(directory: Path) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, options=options())


def save(checkpointer: ckpt.Checkpointer, step: int) -> None:
    checkpointer.save(step, {"step": step}).result(30)


def test_a_new_one_of_the_process_takes_over(tmp_path: Path, native: Any) -> None:
    """As when a cell of a notebook is run again after an error, whose traceback keeps the Checkpointer of before."""
    with make(tmp_path) as old, make(tmp_path) as new:
        save(old, 1)
        assert new.steps() == [1] and new.restore(exclusive=True) is not None
        save(old, 2)  # looking has taken nothing
        save(new, 3)
        for _ in range(2):
            with pytest.raises(InUseError, match="another Checkpointer of this process has taken"):
                old.save(4, {})
        assert old.steps() == [1, 2, 3] and old.restore() is not None
        old.close()
        save(new, 5)  # nor does the end of the old one let go of what is no longer its own


def test_a_new_one_waits_for_what_is_in_flight(tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=0.5)
    with make(tmp_path) as old, make(tmp_path) as new:
        pending = old.save(1, {"step": 1})
        found = new.restore(exclusive=True)
        assert found is not None and found.step == 1
        assert pending.exception(30) is None  # soon: the directory is let go of just before that
        pending = old.save(2, {"step": 2})
        save(new, 3)
        assert pending.exception(0) is None and new.steps() == [1, 2, 3]
    native.clear_faults()


def test_a_new_one_does_not_take_over_what_hangs(tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=3.0)
    with make(tmp_path) as old, ckpt.Checkpointer(tmp_path, options=options(timeout_s=0.2)) as new:
        pending = old.save(1, {"step": 1})
        for attempt in (lambda: new.restore(exclusive=True), lambda: new.save(2, {})):
            with pytest.raises(InUseError, match="another Checkpointer of this process, which still had saves in flight"):
                attempt()
        assert not pending.done(), "the storage was too quick for this test"
        native.clear_faults()
        assert pending.exception(30) is None
        save(old, 3)


def leave_unfinished(directory: Path, step: int) -> None:
    """As a save that died leaves it."""
    path = directory / f"step-{step:012d}"
    path.mkdir()
    temporary_names.temporary_path(path / "state.pt").touch()


@pytest.mark.parametrize("timeout_s", [0.2, DEADLINE_S], ids=["short", "long"])
def test_one_that_cleans_does_not_give_way(timeout_s: float, tmp_path: Path, native: Any) -> None:
    """Else it would remove what the new one has saved in the meantime."""
    leave_unfinished(tmp_path, 5)
    outcomes: list[BaseException | None] = []

    def run(checkpointer: ckpt.Checkpointer, step: int) -> None:
        try:
            outcomes.append(save(checkpointer, step))
        except CheckpointError as error:
            outcomes.append(error)

    native.set_fault("rename", ".tmp-step-000000000005", delay_s=DEADLINE_S)
    with (
        make(tmp_path) as old,
        ckpt.Checkpointer(tmp_path, options=options(timeout_s=timeout_s)) as new,
        contextlib.ExitStack() as on_the_way_out,
    ):
        on_the_way_out.callback(native.clear_faults)
        cleaning = threading.Thread(target=run, args=(old, 4))
        cleaning.start()
        wait_until(lambda: somebody_is_in("retire_directory"))
        coming = threading.Thread(target=run, args=(new, 5))
        coming.start()
        if timeout_s < DEADLINE_S:
            coming.join(patience(10))
        else:
            wait_until(lambda: somebody_is_in("give_way"))
        first = outcomes[:]
        native.clear_faults()
        cleaning.join(patience(30))
        coming.join(patience(30))
        if timeout_s < DEADLINE_S:
            assert isinstance(first[0], InUseError) and "still had saves in flight" in str(first[0])
        save(new, 5)
        assert 5 in new.steps() and new.restore() == (5, {"step": 5})


def test_who_takes_an_empty_step_back_has_not_given_way(tmp_path: Path, native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    removing, go_on = threading.Event(), threading.Event()
    real = durable.remove_if_empty

    def slow(directory: Path) -> None:
        removing.set()
        go_on.wait(patience(30))
        real(directory)

    monkeypatch.setattr(durable, "remove_if_empty", slow)
    with make(tmp_path) as old, ckpt.Checkpointer(tmp_path, options=options(timeout_s=0.2)) as new:
        native.set_fault("pwritev", error=errno.ENOSPC)
        pending = old.save(1, {"step": 1})
        assert removing.wait(patience(30))
        native.clear_faults()
        with pytest.raises(InUseError, match="in flight"):
            new.save(1, {"step": 1})
        go_on.set()
        assert pending.exception(30) is not None
        save(new, 1)
        with pytest.raises(CheckpointError):
            old.wait()
        with pytest.raises(CheckpointError):
            old.close()


def test_a_second_trainer_hears_of_it_before_it_trains(tmp_path: Path, native: Any) -> None:
    program = f"""
import ckpt, torch
from ckpt.integrations.torch import CheckpointCallback
print(ckpt.Checkpointer({str(tmp_path)!r}).restore().step)
model = torch.nn.Linear(2, 2)
try:
    CheckpointCallback({str(tmp_path)!r}, model=model).resume()
except ckpt.errors.InUseError as error:
    print(error)
"""
    with make(tmp_path) as first:
        save(first, 1)
        for step in (2, 3):
            run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
            said = run.stdout.splitlines()
            assert said[0] == str(step - 1) and f"process {os.getpid()} on" in said[1]
            save(first, step)  # the look of the other has not taken the lock away


def test_a_second_process_may_look_but_not_save(tmp_path: Path, native: Any) -> None:
    program = f"""
import ckpt
checkpointer = ckpt.Checkpointer({str(tmp_path)!r})
assert checkpointer.restore().step == 1
try:
    checkpointer.save(2, {{}})
except ckpt.errors.InUseError as error:
    print(error)
"""
    with make(tmp_path) as first:
        save(first, 1)
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=patience(60), check=True)
        assert f"process {os.getpid()} on" in run.stdout and str(tmp_path) in run.stdout
        assert "directory of its own" in run.stdout
        save(first, 2)  # the look of the other has not taken the lock away


def test_a_killed_process_is_in_nobodys_way(tmp_path: Path, native: Any) -> None:
    program = f"""
import ckpt, sys, time, torch.multiprocessing
checkpointer = ckpt.Checkpointer({str(tmp_path)!r})
checkpointer.save(1, {{}}).result()
torch.multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True).start()
print("saved", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "saved\n"
        with make(tmp_path) as checkpointer:
            with pytest.raises(InUseError):
                checkpointer.save(2, {})
            process.kill()  # its child lives on
            process.wait(patience(10))
            save(checkpointer, 2)
        process.stdout.close()


def test_one_that_nobody_holds_any_more_is_in_nobodys_way(tmp_path: Path, native: Any) -> None:
    save(make(tmp_path), 1)

    def is_free() -> bool:
        gc.collect()
        with make(tmp_path) as checkpointer:
            try:
                save(checkpointer, 2)
            except CheckpointError:
                return False
        return True

    wait_until(is_free, what="the end of the Checkpointer that nobody holds")


def test_ranks_hear_of_the_refusal(tmp_path: Path, native: Any) -> None:
    """As rank 1 sees it, whose rank 0 may not save."""

    class Rank1(ckpt.coordinator.Coordinator):
        name, rank, world_size = "test", 1, 2

        def gather(self, key: str, payload: bytes, timeout_s: float) -> None:
            return None

        def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
            return b'{"refusal": "somebody else does"}'

        def interrupt(self) -> None:
            pass

        def close(self) -> None:
            pass

    begin = time.monotonic()
    with (
        ckpt.Checkpointer(tmp_path, options=options(), coordinator=Rank1()) as checkpointer,
        pytest.raises(ckpt.errors.PeerError, match="rank 0 may not save: somebody else does"),
    ):
        checkpointer.save(1, {})
    assert time.monotonic() - begin < DEADLINE_S / 2


def test_a_copy_of_the_directory_does_not_open_it_to_another_job(tmp_path: Path, native: Any) -> None:
    """Closing any descriptor of the lock's file drops the lock; the next save takes it again."""
    saving = f"""
import ckpt
with ckpt.Checkpointer({str(tmp_path / "run")!r}) as checkpointer:
    checkpointer.save(9, {{}}).result()
"""
    with make(tmp_path / "run") as first:
        save(first, 1)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        save(first, 2)
        run = subprocess.run([sys.executable, "-c", saving], capture_output=True, text=True, timeout=patience(60))
        assert run.returncode != 0 and "InUseError" in run.stderr


def test_who_has_lost_the_directory_publishes_nothing_more(tmp_path: Path, native: Any) -> None:
    holding = f"""
import ckpt, sys
checkpointer = ckpt.Checkpointer({str(tmp_path)!r})
checkpointer.save(5, {{}}).result()
print("saved", flush=True)
sys.stdin.read()
"""
    with make(tmp_path) as first:
        save(first, 1)
        (tmp_path / ".lock").read_bytes()
        with subprocess.Popen(
            [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None and other.stdout.readline() == "saved\n"
            with pytest.raises(InUseError, match=f"process {other.pid}"):
                save(first, 2)
            assert first.steps() == [1, 5]
        save(first, 3)
