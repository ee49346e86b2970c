"""Storage that is slow, or hangs for a while: what training sees of it, and what it does not."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options, patience, wait_until

import ckpt
from ckpt.errors import ClosedError, DeadlineError, SkippedError, StorageError
from ckpt.saving import inspection

pytestmark = pytest.mark.usefixtures("native")

HANG_S = 2000.0  # of a call that does not come back before the faults are cleared
PROMPT_S = patience(20.0)  # far above what the operation takes, far below that


def make_tensors(count: int = 8, rows: int = 256) -> dict[str, torch.Tensor]:
    """256 KiB each by default: together twice the arena of tiny()."""
    return {f"t{index}": torch.full((rows, 256), float(index)) for index in range(count)}


def tiny(**changes: Any) -> ckpt.Options:
    return options(**({"arena_bytes": "1MiB", "chunk_bytes": "64KiB", "writers": 1} | changes))


def change_all(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.fill_(-1.0)


def held(path: Path) -> int:
    return sum(1 for _ in path.glob(".tmp-*"))


@pytest.mark.parametrize("writers", [1, 3])
def test_the_fence_captures_what_slow_writers_have_not_taken(writers: int, tmp_path: Path, native: Any) -> None:
    tensors = make_tensors()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    native.set_fault("pwritev", delay_s=0.1)
    pending = ckpt.save(tensors, tmp_path / "a.pt", lazy=True, options=tiny(writers=writers))
    assert not pending.captured
    ckpt.fence()
    assert pending.captured
    change_all(tensors)
    pending.result(60)
    assert pending.stats.bytes_copied_at_fence > 0
    assert pending.stats.fence_s > 0
    assert_same(expected, ckpt.load(tmp_path / "a.pt"))


def test_the_fence_does_not_wait_for_the_flush(tmp_path: Path, native: Any) -> None:
    tensors = make_tensors(count=2)  # fits the arena
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    native.set_fault("fdatasync", delay_s=HANG_S)
    pending = ckpt.save(tensors, tmp_path / "a.pt", lazy=True, options=tiny())
    ckpt.fence()
    change_all(tensors)
    assert not pending.done()
    native.clear_faults()
    pending.result(60)
    assert_same(expected, ckpt.load(tmp_path / "a.pt"))


def test_back_pressure_is_measured(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", delay_s=0.005)
    pending = ckpt.save(make_tensors(), tmp_path / "a.pt", options=tiny())  # all copied: twice the arena
    assert pending.stats.arena_wait_s > 0.02
    assert pending.stats.save_s >= pending.stats.arena_wait_s
    pending.result(60)


def test_a_capture_that_outruns_its_deadline_fails_the_save_and_not_the_training(tmp_path: Path, native: Any) -> None:
    tensors = make_tensors()
    native.set_fault("pwritev", count=1, delay_s=HANG_S)
    with ckpt.Checkpointer(tmp_path, options=tiny(timeout_s=1.0)) as checkpointer:
        pending = checkpointer.save(1, tensors, lazy=True)
        begin = time.monotonic()
        ckpt.fence()
        assert time.monotonic() - begin < PROMPT_S
        assert pending.captured, "the tensors may change: nothing of this save will be published"
        change_all(tensors)
        native.clear_faults()
        error = pending.exception(30)
        assert isinstance(error, DeadlineError) and isinstance(error, TimeoutError)
        assert "timeout" in str(error) and "arena_bytes" in str(error)
        assert checkpointer.steps() == []
        checkpointer.save(2, tensors).result(30)
        assert checkpointer.steps() == [2]
        engine = inspection.engine_of(checkpointer)
        wait_until(lambda: engine.arena_used == 0, what="an empty arena")


def test_a_deadline_inside_save(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", count=1, delay_s=HANG_S)
    with ckpt.Checkpointer(tmp_path, options=tiny(timeout_s=1.0)) as checkpointer:
        begin = time.monotonic()
        pending = checkpointer.save(1, make_tensors())  # copied, but the arena has no room: not raised here
        assert time.monotonic() - begin < PROMPT_S
        native.clear_faults()
        assert isinstance(pending.exception(30), DeadlineError)
        checkpointer.save(2, make_tensors()).result(30)


def test_no_place_in_flight_within_the_deadline(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", count=1, delay_s=HANG_S)
    small = make_tensors(count=1, rows=64)
    with ckpt.Checkpointer(tmp_path, options=tiny(timeout_s=1.0, max_in_flight=1)) as checkpointer:
        first = checkpointer.save(1, small)
        second = checkpointer.save(2, small)
        assert isinstance(second.exception(0), DeadlineError)
        native.clear_faults()
        assert first.result(30)
        checkpointer.save(3, small).result(30)
        assert checkpointer.steps() == [1, 3]
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
            "step-000000000001",
            "step-000000000003",
        ]


def test_a_busy_engine_skips(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", count=1, delay_s=HANG_S)
    small = make_tensors(count=1, rows=64)
    changes: dict[str, Any] = {"when_busy": "skip", "max_in_flight": 1, "max_failed_saves": 1}
    with ckpt.Checkpointer(tmp_path, options=tiny(**changes)) as checkpointer:
        first = checkpointer.save(1, small)
        begin = time.monotonic()
        skipped = [checkpointer.save(step, small) for step in (2, 3)]
        assert time.monotonic() - begin < PROMPT_S
        assert all(isinstance(pending.exception(0), SkippedError) for pending in skipped)
        native.clear_faults()
        first.result(30)
        checkpointer.save(4, small).result(30)
        checkpointer.wait()  # a skipped save is no failure
        assert checkpointer.steps() == [1, 4]


def test_an_error_while_the_fence_waits_ends_the_wait(tmp_path: Path, native: Any) -> None:
    tensors = make_tensors()
    native.set_fault("pwritev", skip=1, count=1, delay_s=0.2)
    native.set_fault("pwritev", skip=2, error=errno.EIO)
    with ckpt.Checkpointer(tmp_path, options=tiny()) as checkpointer:
        pending = checkpointer.save(1, tensors, lazy=True)
        ckpt.fence()  # must not raise: training goes on
        assert pending.captured
        error = pending.exception(30)
        assert isinstance(error, StorageError) and error.errno == errno.EIO
        native.clear_faults()
        checkpointer.save(2, tensors).result(30)


def test_an_error_while_save_copies(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", skip=2, error=errno.ENOSPC)
    with ckpt.Checkpointer(tmp_path, options=tiny()) as checkpointer:
        pending = checkpointer.save(1, make_tensors())  # twice the arena: the error comes while it waits for room
        assert isinstance(pending.exception(30), StorageError)
        native.clear_faults()
        checkpointer.save(2, make_tensors()).result(30)


def test_training_with_a_full_disk_ends_where_training_without_saves_ends(tmp_path: Path, native: Any) -> None:
    native.set_fault("fallocate", error=errno.ENOSPC)
    assert_same(train(None), train(tmp_path))


def test_training_on_slow_storage_ends_where_training_without_saves_ends(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", delay_s=0.002)
    native.set_fault("fsync", delay_s=0.002)
    assert_same(train(None), train(tmp_path))
    with ckpt.Checkpointer(tmp_path, options=tiny()) as checkpointer:
        found = checkpointer.restore()
    assert found is not None and found.step == 7
    assert_same(train(None), found.state)


def train(directory: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Tanh(), torch.nn.Linear(256, 128))
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(1)
    checkpointer = ckpt.Checkpointer(directory, options=tiny(max_failed_saves=0)) if directory else None
    for step in range(8):
        batch = torch.randn(16, 128, generator=generator)
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if checkpointer:
            checkpointer.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    if checkpointer:
        checkpointer.restore()  # waits for all
        inspection.forget_failures(checkpointer)  # the faults are meant
        checkpointer.close()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


# ---- giving up -------------------------------------------------------------------------------------------------------


def test_close_gives_up_at_its_deadline(tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    native.set_fault("pwritev", count=1, delay_s=HANG_S)
    checkpointer = ckpt.Checkpointer(tmp_path, options=tiny(drain_timeout_s=0.3))
    pending = checkpointer.save(1, make_tensors(count=1))
    begin = time.monotonic()
    with pytest.raises(DeadlineError):
        checkpointer.close()
    assert time.monotonic() - begin < PROMPT_S
    assert inspection.uncaptured() == 0, "fences would look after it for ever"
    native.clear_faults()
    assert isinstance(pending.exception(30), (DeadlineError, ClosedError))
    with pytest.raises(ClosedError):
        checkpointer.save(2, make_tensors(count=1))
    wait_until(lambda: not any(path.is_dir() for path in tmp_path.iterdir()), what="the removal of the abandoned save")


def test_waits_with_a_timeout(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", count=1, delay_s=HANG_S)
    with ckpt.Checkpointer(tmp_path, options=tiny()) as checkpointer:
        pending = checkpointer.save(1, make_tensors(count=1))
        for wait in (pending.result, pending.exception, checkpointer.wait):
            with pytest.raises(DeadlineError):
                wait(0.02)
        assert not pending.done()
        native.clear_faults()
        assert pending.result(30)


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupt_soon(delay_s: float = 0.3) -> threading.Timer:
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_at_the_fence(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", count=2, delay_s=HANG_S)
    tensors = make_tensors()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    pending = ckpt.save(tensors, tmp_path / "a.pt", lazy=True, options=tiny())
    begin = time.monotonic()
    timer = interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        ckpt.fence()
    assert time.monotonic() - begin < PROMPT_S
    native.clear_faults()
    timer.join()
    assert pending.result(30)  # nobody has changed the tensors
    assert_same(expected, ckpt.load(tmp_path / "a.pt"))


@pytest.mark.parametrize("verify", [False, True])
def test_ctrl_c_inside_save(verify: bool, tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", count=2, delay_s=1.0)
    native.set_fault("pwritev", "a.pt", skip=2, count=2, delay_s=0.1)
    tensors = make_tensors(count=64)  # 16 MiB, their memory goes back to the system when they go
    timer = interrupt_soon()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ckpt.save(
            {"lazy": tensors, "copied": make_tensors()}, tmp_path / "a.pt", lazy=tensors, options=tiny(verify_capture=verify)
        )
    assert time.monotonic() - begin < PROMPT_S
    timer.join()
    tensors.clear()
    wait_until(lambda: held(tmp_path) == 0, what="the removal of the temporary file")
    assert list(tmp_path.iterdir()) == []
    ckpt.save(make_tensors(), tmp_path / "a.pt", options=tiny()).result(30)


def test_ctrl_c_in_a_wait_for_the_result(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", count=1, delay_s=HANG_S)
    pending = ckpt.save(make_tensors(count=1), tmp_path / "a.pt", options=tiny())
    begin = time.monotonic()
    timer = interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        pending.result()
    assert time.monotonic() - begin < PROMPT_S
    native.clear_faults()
    timer.join()
    assert pending.result(30)


def test_ctrl_c_while_a_save_waits_for_its_turn(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", count=1, delay_s=HANG_S)
    with ckpt.Checkpointer(tmp_path, options=tiny(max_in_flight=1)) as checkpointer:
        checkpointer.save(1, make_tensors(count=1))
        begin = time.monotonic()
        timer = interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(2, make_tensors(count=1))
        assert time.monotonic() - begin < PROMPT_S
        native.clear_faults()
        timer.join()
        checkpointer.save(3, make_tensors(count=1)).result(30)
        assert checkpointer.steps() == [1, 3]
