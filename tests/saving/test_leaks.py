"""Thousands of saves leave nothing behind: no thread, no descriptor, no memory, no object."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from support import assert_no_leak, assert_same, options, resources, wait_until

import ckpt
from ckpt.errors import CaptureError, StorageError
from ckpt.saving import inspection

SAVES = 2000
WARM_UP = 200
MEMORY_BYTES = 4 << 20  # far below one state for each save, far above the noise of an allocator


def small_state() -> dict[str, Any]:
    return {"weights": torch.zeros(64, 64), "moments": [torch.ones(33), torch.ones(5000)], "step": 0}


def many(save: Callable[[int], ckpt.PendingSave]) -> None:
    """Saves a warm-up first; the rest must not grow anything."""
    pending: ckpt.PendingSave | None = None
    before = None
    for number in range(WARM_UP + SAVES):
        if number == WARM_UP:
            assert pending is not None
            pending.result(60)
            before = resources()
        pending = save(number)
    assert pending is not None and before is not None
    pending.result(60)
    del pending
    assert_no_leak(before, memory_bytes=MEMORY_BYTES)
    wait_until(lambda: inspection.uncaptured() == 0, what="an empty list of uncaptured saves")


@pytest.mark.slow
def test_many_steps(tmp_path: Path) -> None:
    state = small_state()
    with ckpt.Checkpointer(tmp_path, keep=2, options=options(arena_bytes="1MiB")) as checkpointer:
        many(lambda number: checkpointer.save(number, state, lazy=True))
        checkpointer.wait()
        assert checkpointer.steps() == [WARM_UP + SAVES - 2, WARM_UP + SAVES - 1]
        assert inspection.engine_of(checkpointer).arena_used == 0
    # Old ones are removed behind what is waited for, and all of them when it is closed.
    assert len(list(tmp_path.iterdir())) == 5, "the lock, latest, the events, and the two that are kept"


def test_many_files(tmp_path: Path) -> None:
    state = small_state()
    settings = options(arena_bytes="1MiB")
    many(lambda number: ckpt.save(state | {"step": number}, tmp_path / f"{number % 3}.pt", options=settings))
    assert inspection.engine_for(settings).arena_used == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt", "2.pt"]
    assert_same(state | {"step": WARM_UP + SAVES - 1}, ckpt.load(tmp_path / f"{(WARM_UP + SAVES - 1) % 3}.pt"))


def test_many_loads(tmp_path: Path) -> None:
    ckpt.save(small_state(), tmp_path / "a.pt", options=options()).result(30)
    for _ in range(50):
        ckpt.load(tmp_path / "a.pt")
    before = resources()
    for _ in range(500):
        ckpt.load(tmp_path / "a.pt")
    assert_no_leak(before, memory_bytes=MEMORY_BYTES)


def test_many_failures(tmp_path: Path, native: Any) -> None:
    """Errors must not hold what they were about."""
    state = {"weights": torch.zeros(256, 256)}
    with ckpt.Checkpointer(tmp_path, options=options(arena_bytes="1MiB", max_failed_saves=0)) as checkpointer:

        def fail_once(number: int) -> None:
            call = ("open", "fallocate", "pwritev", "fdatasync", "rename", "fsync")[number % 6]
            native.set_fault(call, count=1, error=28)
            assert isinstance(checkpointer.save(number, state, lazy=True).exception(30), StorageError)
            native.clear_faults()

        for number in range(60):
            fail_once(number)
        before = resources()
        for number in range(60, 360):
            fail_once(number)
        assert_no_leak(before, memory_bytes=MEMORY_BYTES)
        engine = inspection.engine_of(checkpointer)
        wait_until(lambda: engine.arena_used == 0, what="an empty arena")
        assert inspection.uncaptured() == 0
        checkpointer.save(1000, state).result(30)


def test_many_checkpointers(tmp_path: Path) -> None:
    def open_and_close(number: int) -> None:
        with ckpt.Checkpointer(tmp_path / f"run-{number % 5}", options=options(arena_bytes=(1 << 20) + 4096 * number)) as c:
            c.save(number, small_state())

    for number in range(5):
        open_and_close(number)
    before = resources()
    for number in range(5, 55):
        open_and_close(number)
    assert_no_leak(before, memory_bytes=MEMORY_BYTES)
    assert not any(thread.name.startswith("ckpt") for thread in _threads())


def _threads() -> list[Any]:
    import threading

    return threading.enumerate()


def test_checkpointers_with_the_same_options_share_an_engine(tmp_path: Path) -> None:
    before = psutil.Process().num_threads()
    with ckpt.Checkpointer(tmp_path / "a", options=options()) as a:
        a.save(1, small_state()).result(30)
        wait_until(lambda: psutil.Process().num_threads() <= before + 3, what="the end of the thread that touches the arena")
        with ckpt.Checkpointer(tmp_path / "b", options=options()) as b:
            b.save(1, small_state()).result(30)
            assert psutil.Process().num_threads() <= before + 4, "one more: each has a finisher"
        a.save(2, small_state()).result(30)  # the first close must not have ended it
    wait_until(lambda: psutil.Process().num_threads() <= before, what="the end of all threads")


# ---- objects ---------------------------------------------------------------------------------------------------------


def watched_tensor(values: int = 1 << 16) -> tuple[torch.Tensor, weakref.ref[Any]]:
    """A tensor, and a reference that dies with its memory."""
    array = np.ones(values, dtype=np.float32)
    return torch.from_numpy(array), weakref.ref(array)


def test_a_finished_save_is_let_go(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        tensor, memory = watched_tensor()
        pending = checkpointer.save(1, {"weights": tensor}, lazy=True)
        pending.result(30)
        save = weakref.ref(inspection.task_of(pending))
        del pending, tensor
        wait_until(lambda: gc.collect() >= 0 and memory() is None, 10, "the end of the tensor's memory")
        checkpointer.wait()
        wait_until(lambda: gc.collect() >= 0 and save() is None, 10, "the end of the save")


def test_memory_is_let_go_once_captured_although_the_flush_goes_on(tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=60)
    tensor, memory = watched_tensor()
    pending = ckpt.save({"weights": tensor}, tmp_path / "a.pt", lazy=True, options=options())
    del tensor
    ckpt.fence()
    assert pending.captured
    wait_until(lambda: memory() is None, 10, "the end of the tensor's memory")
    assert not pending.done()
    native.clear_faults()
    assert torch.equal(ckpt.load(pending.result(30))["weights"], torch.ones(1 << 16))


def test_memory_is_kept_until_captured_although_nobody_else_holds_it(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", delay_s=60)
    tensor, memory = watched_tensor()
    pending = ckpt.save({"weights": tensor}, tmp_path / "a.pt", lazy=True, options=options(writers=1))
    del tensor
    gc.collect()
    assert memory() is not None
    native.clear_faults()
    assert torch.equal(ckpt.load(pending.result(30))["weights"], torch.ones(1 << 16))
    wait_until(lambda: memory() is None, 10, "the end of the tensor's memory")


@pytest.mark.parametrize("how", ["storage", "changed", "raised"])
def test_memory_of_a_failed_save_is_let_go(how: str, tmp_path: Path, native: Any) -> None:
    class Unpicklable:
        def __reduce__(self) -> Any:
            raise ValueError("not this one")

    tensor, memory = watched_tensor()
    state: dict[str, Any] = {"weights": tensor}
    if how == "storage":
        native.set_fault("pwritev", error=5)
        assert isinstance(ckpt.save(state, tmp_path / "a.pt", lazy=True, options=options()).exception(30), StorageError)
    elif how == "changed":
        native.set_fault("pwritev", delay_s=60)
        pending = ckpt.save(state, tmp_path / "a.pt", lazy=True, options=options())
        tensor.add_(1)
        native.clear_faults()
        assert isinstance(pending.exception(30), CaptureError)
    else:
        with pytest.raises(ValueError, match="not this one"):
            ckpt.save(state | {"x": Unpicklable()}, tmp_path / "a.pt", lazy=True, options=options())
    del tensor, state
    if how == "changed":
        del pending
    wait_until(lambda: gc.collect() >= 0 and memory() is None, 10, "the end of the tensor's memory")


def test_a_model_that_was_saved_can_go(tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.Adam(model.parameters())
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        for step in range(3):
            model(torch.ones(1, 100)).sum().backward()
            optimizer.step()
            checkpointer.save(step, {"model": model, "optimizer": optimizer.state_dict()})
        checkpointer.wait()
        gone = [weakref.ref(model), weakref.ref(optimizer)]
        del model, optimizer
        wait_until(lambda: gc.collect() >= 0 and not any(ref() for ref in gone), 10, "the end of model and optimizer")


def test_resident_memory_stays_within_the_arena(tmp_path: Path) -> None:
    """A state 16 times the arena, written over and over, copied and lazily: no second copy of it arises."""
    state = {str(index): torch.zeros(1 << 18) for index in range(16)}  # 1 MiB each
    with ckpt.Checkpointer(tmp_path, keep=1, options=options(arena_bytes="1MiB", chunk_bytes="64KiB")) as checkpointer:
        checkpointer.save(0, state).result(30)
        before = resources()
        for step in range(1, 9):
            checkpointer.save(step, state, lazy=step % 2 == 0)
            ckpt.fence()
            assert resources().memory_bytes < before.memory_bytes + MEMORY_BYTES
        checkpointer.wait()
        assert inspection.engine_of(checkpointer).arena_peak <= 1 << 20
