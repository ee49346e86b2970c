"""The order in which a step becomes a checkpoint, and an old one goes: what must be durable before what."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, clear_faults, options, wait_until

import ckpt
from ckpt.errors import StorageError
from ckpt.storage import durable

pytestmark = pytest.mark.usefixtures("native")

AT_ONCE = 4  # fsyncs before the manifest gets its name: of it, of `latest`, of the step directory, and of the one above


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((5_000,), float(step))}


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:012d}"


@pytest.mark.parametrize("skip", range(AT_ONCE))
def test_the_manifest_gets_its_name_when_all_else_is_durable(skip: int, tmp_path: Path, native: Any) -> None:
    with ckpt.Checkpointer(tmp_path, options=options(max_failed_saves=0)) as checkpointer:
        checkpointer.save(1, state(1)).result(DEADLINE_S)
        native.set_fault("fsync", skip=skip, count=1, error=errno.EIO)
        failed = checkpointer.save(2, state(2))
        assert isinstance(failed.exception(DEADLINE_S), StorageError)
        clear_faults()
        assert not step_path(tmp_path, 2).exists() and (tmp_path / "latest").read_text() == "step-000000000001\n"
        assert checkpointer.steps() == [1] and not list(tmp_path.glob(".tmp-*"))
        checkpointer.save(2, state(2)).result(DEADLINE_S)
        assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize("needed", ["manifest.json", ".tmp-latest"])
def test_it_waits_for_each_of_them(needed: str, tmp_path: Path, native: Any) -> None:
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, state(1)).result(DEADLINE_S)
        native.set_fault("fsync", needed, delay_s=DEADLINE_S)
        pending = checkpointer.save(2, state(2))
        manifest, aside = step_path(tmp_path, 2) / "manifest.json", step_path(tmp_path, 2)
        wait_until(lambda: any(path.stat().st_size for path in aside.glob(".tmp-manifest*")), what="the manifest aside")
        wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".tmp-latest*")), what="`latest` aside")
        assert not manifest.exists() and not pending.done()
        assert (tmp_path / "latest").read_text() == "step-000000000001\n"
        clear_faults()
        pending.result(DEADLINE_S)
        assert manifest.exists() and (tmp_path / "latest").read_text() == "step-000000000002\n"


def test_all_are_written_before_the_first_is_waited_for(tmp_path: Path, native: Any) -> None:
    """So that one journal holds them."""
    content = {tmp_path / "a": b"first", tmp_path / "b": b"second"}
    inner = tmp_path / "inner"
    inner.mkdir()
    native.set_fault("fsync", delay_s=DEADLINE_S)
    done = threading.Event()

    def make_durable() -> None:
        durable.make_durable(content, [tmp_path, inner])
        done.set()

    thread = threading.Thread(target=make_durable)
    thread.start()
    wait_until(lambda: all(path.exists() and path.read_bytes() == text for path, text in content.items()))
    assert not done.is_set()
    clear_faults()
    thread.join(DEADLINE_S)
    assert done.is_set()


def test_nothing_of_an_old_step_goes_before_its_name_is_gone_for_good(tmp_path: Path, native: Any) -> None:
    """Else a crash could bring the name back, and half of what was there."""
    with ckpt.Checkpointer(tmp_path, keep=1, options=options()) as checkpointer:
        checkpointer.save(1, state(1)).result(DEADLINE_S)
        native.set_fault("fsync", skip=AT_ONCE + 2, count=1, error=errno.EIO)  # and one behind each rename
        checkpointer.save(2, state(2)).result(DEADLINE_S)
        checkpointer.wait()
        wait_until(lambda: list(tmp_path.glob(".tmp-step-*")), what="a retired step")
        (retired,) = tmp_path.glob(".tmp-step-*")
        assert sorted(path.name for path in retired.iterdir()) == ["manifest.json", "state.pt"]
        assert_same(state(1), ckpt.load(retired / "state.pt"))
        clear_faults()
        checkpointer.save(3, state(3)).result(DEADLINE_S)
        wait_until(lambda: not list(tmp_path.glob(".tmp-step-*")), what="the removal")
        assert checkpointer.steps() == [3]
