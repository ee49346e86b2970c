"""A job that removes old checkpoints itself is not left without any, or hears of it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, clear_faults, options
from test_bundles import Job, job  # noqa: F401

import ckpt
from ckpt.errors import CheckpointError, StorageError
from ckpt.integrations.torch import CheckpointCallback


def make(directory: Path, **how: Any) -> CheckpointCallback:
    return CheckpointCallback(directory, model=torch.nn.Linear(30, 30), options=options(), **how)


def test_a_callback_that_waits_returns_what_is_durable(tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=0.3)
    with make(tmp_path / "waiting", wait_before_return=True) as callback:
        pending = callback.step(1)
        assert pending is not None and pending.done() and callback.checkpointer.steps() == [1]
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    with make(tmp_path / "not") as callback:
        pending = callback.step(1)
        assert pending is not None and not pending.done()
        clear_faults()


def test_a_callback_that_waits_raises_what_a_save_died_of(tmp_path: Path, native: Any) -> None:
    with pytest.raises(StorageError), make(tmp_path, wait_before_return=True) as callback:
        callback.step(1)
        native.set_fault("pwritev", error=errno.ENOSPC)
        with pytest.raises(StorageError, match="No space left"):
            callback.step(2)
        clear_faults()
        assert callback.checkpointer.steps() == [1]


def test_a_callback_says_that_no_checkpoint_is_left(tmp_path: Path, native: Any) -> None:
    with make(tmp_path) as callback:
        pending = callback.save(1)
        pending.result(DEADLINE_S)
        native.set_fault("pwritev", error=errno.ENOSPC)
        second = callback.save(2)
        assert second.exception(DEADLINE_S) is not None
        clear_faults()
        shutil.rmtree(tmp_path / "step-000000000001")
        with pytest.raises(ckpt.CheckpointError, match=r"no checkpoint is left in .*where there was one"):
            callback.step(3)
        assert callback.save(4).result(DEADLINE_S)
        assert callback.checkpointer.steps() == [4]


def test_a_callback_says_so_at_the_next_step(tmp_path: Path, native: Any) -> None:
    """Not only at the next that saves, which may be hours away."""
    with make(tmp_path, every=100) as callback:
        callback.save(1).result(DEADLINE_S)
        native.set_fault("pwritev", error=errno.ENOSPC)
        failed = callback.step(100)
        assert failed is not None and failed.exception(DEADLINE_S) is not None
        clear_faults()
        shutil.rmtree(tmp_path / "step-000000000001")
        with pytest.raises(ckpt.CheckpointError, match=r"no checkpoint is left in .*where there was one"):
            callback.step(101)
        assert callback.step(102) is None, "it is said once"
        assert callback.step(200) is not None


def test_one_that_was_published_while_the_next_was_in_flight_counts(tmp_path: Path, native: Any) -> None:
    model = torch.nn.Linear(30, 30)
    with CheckpointCallback(tmp_path, model=model, options=options(max_in_flight=2)) as callback:
        native.set_fault("fdatasync", "step-000000000001", delay_s=DEADLINE_S)
        first = callback.save(1)
        native.set_fault("pwritev", "step-000000000002", error=errno.ENOSPC)
        second = callback.save(2)
        assert not first.done()
        native.clear_faults("fdatasync")
        first.result(DEADLINE_S)
        assert second.exception(DEADLINE_S) is not None
        clear_faults()
        shutil.rmtree(tmp_path / "step-000000000001")
        with pytest.raises(ckpt.CheckpointError, match=r"no checkpoint is left in .*where there was one"):
            callback.step(3)
        assert callback.save(4).result(DEADLINE_S)


def test_a_first_save_that_fails_does_not_stop_the_training(tmp_path: Path, native: Any) -> None:
    with make(tmp_path) as callback:
        native.set_fault("pwritev", error=errno.ENOSPC)
        assert callback.save(1).exception(DEADLINE_S) is not None
        clear_faults()
        assert callback.save(2).result(DEADLINE_S)


def test_bundles_say_that_none_is_left(job: Job, native: Any) -> None:  # noqa: F811
    assert job.save("a", 1.0) == [None, None]
    shutil.rmtree(job.roots[0] / "a")
    native.set_fault("pwritev", error=errno.ENOSPC)
    assert all(job.save("b", 2.0))
    clear_faults()
    errors = job.both(lambda rank: job.begin(rank, "c", 3.0))
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert all("There is no checkpoint to go back to" in str(error) for error in errors), errors
    assert job.save("d", 4.0) == [None, None]
