"""A directory of checkpoints: saving by step, counting failures, keeping, restoring past what is damaged."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from states import Position
from support import DEADLINE_S, assert_same, clear_faults, options, patience, wait_until

import ckpt
from ckpt.errors import (
    CheckpointError,
    ClosedError,
    CorruptError,
    DeadlineError,
    FailedSavesError,
    SkippedError,
    StorageError,
)
from ckpt.storage.temporary_names import temporary_path

BESIDE = {".lock", "events.jsonl", "latest"}


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((50_000,), step), "text": "x" * step}


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step-{step:012d}"


def save_all(checkpointer: ckpt.Checkpointer, *steps: int, close: bool = False) -> None:
    for step in steps:
        checkpointer.save(step, state(step)).result(DEADLINE_S)
    if close:
        checkpointer.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


Open = Callable[..., ckpt.Checkpointer]


@pytest.fixture
def opened(directory: Path) -> Iterator[Open]:
    """Makes Checkpointers of the directory, and closes them."""
    made: list[ckpt.Checkpointer] = []

    def make(keep: int | None = 3, **how: Any) -> ckpt.Checkpointer:
        made.append(ckpt.Checkpointer(directory, keep=keep, options=options(**how)))
        return made[-1]

    yield make
    clear_faults()
    for checkpointer in made:
        with contextlib.suppress(CheckpointError):  # the test has seen what it wanted to see
            checkpointer.close()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- saving and finding ----------------------------------------------------------------------------------------------


def test_an_empty_directory(opened: Open, directory: Path) -> None:
    checkpointer = opened()
    assert checkpointer.steps() == [] and checkpointer.restore() is None


def test_what_is_saved_is_restored(opened: Open) -> None:
    checkpointer = opened()
    pending = checkpointer.save(7, state(7))
    assert pending.step == 7
    found = checkpointer.restore()
    assert found is not None and found.step == 7
    step, loaded = found
    assert found.replicated is None
    assert_same((7, state(7)), (step, loaded))


def test_the_directory_on_disk(opened: Open, directory: Path) -> None:
    pending = opened().save(42, state(42))
    published = step_directory(directory, 42)
    assert pending.result(DEADLINE_S) == pending.path == published
    assert {*os.listdir(directory)} == BESIDE | {published.name}
    assert sorted(os.listdir(published)) == ["manifest.json", "state.pt"]
    assert (directory / "latest").read_text() == f"{published.name}\n"
    manifest = json.loads((published / "manifest.json").read_text())
    content = (published / "state.pt").read_bytes()
    assert manifest["step"] == 42 and manifest["world_size"] == 1 and manifest["versions"]["torch"] == torch.__version__
    file = {"name": "state.pt", "bytes": len(content), "crc32": zlib.crc32(content), "kind": "rank", "rank": 0}
    assert manifest["files"] == [file]
    assert_same(state(42), torch.load(published / "state.pt"))


def test_steps_are_those_committed(opened: Open, native: Any) -> None:
    checkpointer = opened(keep=None)
    save_all(checkpointer, 3, 1, 10, 0)
    assert checkpointer.steps() == [0, 1, 3, 10]
    native.set_fault("rename", delay_s=DEADLINE_S)
    pending = checkpointer.save(11, state(11))
    assert checkpointer.steps() == [0, 1, 3, 10]
    clear_faults()
    assert pending.result(DEADLINE_S) and checkpointer.steps() == [0, 1, 3, 10, 11]


def test_the_newest_is_the_one_committed_last(opened: Open, directory: Path) -> None:
    """Not the one of the highest step: a run that was set back goes on from where it was set back to."""
    save_all(opened(keep=None), 100, 200, 50, close=True)
    reopened = opened(keep=None)
    found = reopened.restore()
    assert found is not None and found.step == 50
    save_all(reopened, 60)
    found = opened().restore()
    assert found is not None and found.step == 60
    assert (directory / "latest").read_text() == "step-000000000060\n"


@pytest.mark.parametrize("step", [-1, 10**12, 1.0, "1", None, True], ids=repr)
def test_impossible_steps(step: Any, opened: Open) -> None:
    with pytest.raises(ValueError if type(step) is int else TypeError, match="step"):
        opened().save(step, [])


def test_the_highest_step(opened: Open) -> None:
    checkpointer = opened()
    checkpointer.save(10**12 - 1, []).result(DEADLINE_S)
    assert checkpointer.steps() == [10**12 - 1]


def test_a_state_that_cannot_be_pickled_is_raised_at_once(opened: Open, directory: Path) -> None:
    checkpointer = opened()
    with pytest.raises(Exception, match="pickle"):
        checkpointer.save(1, {"f": lambda: None})
    assert checkpointer.steps() == [] and os.listdir(directory) == [".lock"]
    save_all(checkpointer, 1)
    checkpointer.wait()


def test_map_location_and_objects(opened: Open) -> None:
    checkpointer = opened()
    checkpointer.save(1, Position(1, torch.ones(2), set())).result(DEADLINE_S)
    with pytest.raises(CheckpointError, match="weights_only=False"):
        checkpointer.restore()
    found = checkpointer.restore(weights_only=False, map_location="meta")
    assert found is not None and found.state.weights.is_meta


def test_lazy_tensors_are_fenced(opened: Open, native: Any) -> None:
    native.set_fault("pwritev", delay_s=0.01)
    tensor = torch.ones(1_000_000)
    checkpointer = opened()
    checkpointer.save(1, [tensor], lazy=True)
    ckpt.fence()
    tensor.zero_()
    found = checkpointer.restore()
    assert found is not None and found.state[0].all()


# ---- keeping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 5, None])
def test_keeps_the_newest(keep: int | None, opened: Open, directory: Path) -> None:
    checkpointer = opened(keep=keep)
    save_all(checkpointer, *range(4), close=True)
    with opened(keep) as another:
        assert another.steps() == list(range(4))[-(keep or 4) :]
    assert {*os.listdir(directory)} == BESIDE | {f"step-{step:012d}" for step in range(4)[-(keep or 4) :]}


@pytest.mark.parametrize("keep", [0, -1, 1.5, "3", True], ids=repr)
def test_impossible_numbers_to_keep(keep: Any, directory: Path) -> None:
    with pytest.raises(ValueError, match="keep"):
        ckpt.Checkpointer(directory, keep=keep)
    assert not directory.exists()


def test_keeps_the_last_good_one_while_saves_fail(opened: Open, native: Any) -> None:
    checkpointer = opened(keep=1, max_failed_saves=0)
    save_all(checkpointer, 1)
    native.set_fault("fdatasync", error=errno.EIO)
    for step in range(2, 8):  # with a limit of 0 no number of failures raises
        assert isinstance(checkpointer.save(step, state(step)).exception(DEADLINE_S), StorageError)
    assert checkpointer.steps() == [1]
    found = checkpointer.restore()
    assert found is not None
    assert_same(state(1), found.state)


def test_saving_a_step_again_replaces_it(opened: Open, directory: Path) -> None:
    checkpointer = opened()
    for number in range(4):
        checkpointer.save(5, state(number)).result(DEADLINE_S)
        found = checkpointer.restore()
        assert found is not None and found.step == 5 and found.state["step"] == number
        assert len(os.listdir(step_directory(directory, 5))) == 2, "the old file is gone"
    assert checkpointer.steps() == [5]


def test_saving_a_step_again_that_fails_keeps_the_old(opened: Open, native: Any, directory: Path) -> None:
    checkpointer = opened(max_failed_saves=0)
    save_all(checkpointer, 5)
    for call in ("open", "pwritev", "fdatasync", "rename"):
        native.set_fault(call, path_part="state-2", error=errno.EIO)
        with pytest.raises(StorageError):
            checkpointer.save(5, ["new"]).result(DEADLINE_S)
        clear_faults()
        found = checkpointer.restore()
        assert found is not None
        assert_same(state(5), found.state)
        assert sorted(os.listdir(step_directory(directory, 5))) == ["manifest.json", "state.pt"]


def test_the_same_step_twice_in_flight(opened: Open, native: Any, directory: Path) -> None:
    native.set_fault("fdatasync", delay_s=0.1)
    checkpointer = opened(max_in_flight=4)
    saves = [checkpointer.save(5, state(number)) for number in range(3)]
    assert [save.result(DEADLINE_S) for save in saves] == [step_directory(directory, 5)] * 3
    found = checkpointer.restore()
    assert found is not None and found.state["step"] == 2
    assert len(os.listdir(step_directory(directory, 5))) == 2


def test_what_a_crash_left_is_removed_and_what_is_foreign_is_not(opened: Open, directory: Path) -> None:
    save_all(opened(), 1, 2, close=True)
    half, torn = step_directory(directory, 3), step_directory(directory, 2)
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    temporary_path(half / "manifest.json").write_bytes(b"")  # the mark of a save that was not over
    temporary_path(torn / "state-2.pt").write_bytes(b"half")
    (torn / "state-2.pt").write_bytes(b"unnamed")
    temporary_path(directory / "latest").write_bytes(b"half")
    (directory / "notes.txt").write_text("mine")
    (directory / "step-7").mkdir()
    (torn / "notes.txt").write_text("mine too")
    checkpointer = opened()
    assert checkpointer.steps() == [1, 2]
    assert half.exists(), "looking changes nothing"
    save_all(checkpointer, 4)
    assert {*os.listdir(directory)} == BESIDE | {"notes.txt", "step-7", *(f"step-{step:012d}" for step in (1, 2, 4))}
    assert sorted(os.listdir(torn)) == ["manifest.json", "notes.txt", "state.pt"]


# ---- restoring past damage -------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda step: flip(step / "state.pt"),
    "cut off": lambda step: os.truncate(step / "state.pt", 1000),
    "grown": lambda step: (step / "state.pt").write_bytes((step / "state.pt").read_bytes() + b"x"),
    "empty": lambda step: (step / "state.pt").write_bytes(b""),
    "missing": lambda step: (step / "state.pt").unlink(),
    "no manifest": lambda step: (step / "manifest.json").unlink(),
    "an empty manifest": lambda step: (step / "manifest.json").write_bytes(b""),
    "a broken manifest": lambda step: (step / "manifest.json").write_bytes(b'{"format": 1, "step": 3'),
    "another manifest": lambda step: (step / "manifest.json").write_bytes(b'{"format": 99}'),
    "a manifest of bytes": lambda step: (step / "manifest.json").write_bytes(bytes(range(256))),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_falls_back_past_a_damaged_checkpoint(
    kind: str, opened: Open, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_all(opened(), 1, 2, 3, close=True)
    DAMAGE[kind](step_directory(directory, 3))
    caplog.clear()
    checkpointer = opened()
    found = checkpointer.restore()
    assert found is not None and found.step == 2
    assert_same(state(2), found.state)
    assert [text for text in warnings_in(caplog) if "step-000000000003" in text]
    save_all(checkpointer, 3)
    found = checkpointer.restore()
    assert found is not None and found.step == 3
    assert_same(state(3), found.state)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind != "no manifest"])
def test_no_good_checkpoint_at_all_is_an_error(kind: str, opened: Open, directory: Path) -> None:
    """None would let the job begin anew, and after a few saves nothing would be left of what might be rescued."""
    save_all(opened(), 1, 2, close=True)
    for step in (1, 2):
        DAMAGE[kind](step_directory(directory, step))
    with pytest.raises(CorruptError, match="step-000000000001") as caught:
        opened().restore()
    assert "step-000000000002" in str(caught.value)


def test_a_missing_or_wrong_latest_does_not_matter(opened: Open, directory: Path) -> None:
    save_all(opened(), 1, 2, close=True)
    for content in (None, b"", b"step-000000000001\n", b"nonsense"):
        (directory / "latest").unlink() if content is None else (directory / "latest").write_bytes(content)
        found = opened().restore()
        assert found is not None and found.step == 2


# ---- failures --------------------------------------------------------------------------------------------------------


def test_too_many_failures_in_a_row_are_raised(opened: Open, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = opened(max_failed_saves=2)
    native.set_fault("fdatasync", error=errno.EIO)
    for step in (1, 2):
        assert isinstance(checkpointer.save(step, state(step)).exception(DEADLINE_S), StorageError)
    assert len([text for text in warnings_in(caplog) if "Input/output error" in text]) == 2
    with pytest.raises(FailedSavesError, match=r"last 2 saves.*Input/output error") as caught:
        checkpointer.save(3, state(3))
    assert isinstance(caught.value.__cause__, StorageError)
    assert checkpointer.steps() == []


def test_a_success_ends_the_row(opened: Open, native: Any) -> None:
    checkpointer = opened(max_failed_saves=2)
    for step in range(0, 8, 2):
        native.set_fault("fdatasync", error=errno.EIO)
        assert checkpointer.save(step, state(step)).exception(DEADLINE_S) is not None
        clear_faults()
        assert checkpointer.save(step + 1, state(step + 1)).exception(DEADLINE_S) is None


def test_failures_of_every_kind_count(opened: Open, native: Any) -> None:
    """Also those that the caller's thread meets: training goes on."""
    checkpointer = opened(max_failed_saves=3, max_in_flight=1, timeout_s=0.2)
    for call in ("mkdir", "open", "pwritev"):
        native.set_fault(call, error=errno.ENOSPC)
        pending = checkpointer.save(1, state(1))
        assert isinstance(pending.exception(DEADLINE_S), StorageError), call
        clear_faults()
    with pytest.raises(FailedSavesError):
        checkpointer.save(2, state(2))


def test_a_skipped_save_is_no_failure(opened: Open, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    checkpointer = opened(max_failed_saves=1, when_busy="skip", max_in_flight=1)
    checkpointer.save(1, state(1))
    for step in (2, 3, 4):
        assert isinstance(checkpointer.save(step, state(step)).exception(), SkippedError)
    clear_faults()
    checkpointer.wait(DEADLINE_S)
    assert checkpointer.steps() == [1]


def test_wait_raises_the_newest_failure_once(opened: Open, native: Any) -> None:
    checkpointer = opened()
    native.set_fault("fdatasync", path_part="step-000000000001", error=errno.EIO)
    checkpointer.save(1, state(1))
    checkpointer.save(2, state(2))
    with pytest.raises(StorageError, match="Input/output"):
        checkpointer.wait()
    checkpointer.wait()
    assert checkpointer.steps() == [2]


def test_wait_has_an_end(opened: Open, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    checkpointer = opened()
    checkpointer.save(1, state(1))
    begin = time.monotonic()
    with pytest.raises(DeadlineError):
        checkpointer.wait(timeout=0.1)
    assert time.monotonic() - begin < DEADLINE_S / 2
    clear_faults()
    assert checkpointer.wait(DEADLINE_S) is None and checkpointer.steps() == [1]


def test_a_failure_to_tidy_up_does_not_fail_the_save(opened: Open, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = opened(keep=1)
    save_all(checkpointer, 1)
    native.set_fault("unlink", error=errno.EIO)
    save_all(checkpointer, 2)
    wait_until(lambda: any("the checkpoint is good" in text for text in warnings_in(caplog)))
    clear_faults()
    save_all(checkpointer, 3)
    assert checkpointer.steps() == [3]


# ---- closing ---------------------------------------------------------------------------------------------------------


def test_close_waits_for_what_is_in_flight(opened: Open, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=0.2)
    checkpointer = opened()
    pending = checkpointer.save(1, state(1))
    checkpointer.close()
    assert pending.done() and pending.exception() is None
    checkpointer.close()


def test_close_gives_up_at_its_deadline(opened: Open, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    checkpointer = opened(drain_timeout_s=0.2)
    pending = checkpointer.save(1, state(1))
    begin = time.monotonic()
    with pytest.raises(CheckpointError):
        checkpointer.close()
    assert time.monotonic() - begin < DEADLINE_S / 2
    clear_faults()
    wait_until(pending.done)


@pytest.mark.parametrize("use", ["save", "restore", "wait"])
def test_a_closed_one_refuses(use: str, opened: Open) -> None:
    checkpointer = opened()
    checkpointer.close()
    with pytest.raises(ClosedError):
        {"save": lambda: checkpointer.save(1, []), "restore": checkpointer.restore, "wait": checkpointer.wait}[use]()


def test_close_raises_if_the_newest_save_failed(opened: Open, native: Any) -> None:
    checkpointer = opened()
    native.set_fault("fdatasync", error=errno.EIO)
    checkpointer.save(1, state(1))
    with pytest.raises(StorageError):
        checkpointer.close()
    checkpointer.close()


def test_leaving_the_block_raises_a_failure(directory: Path, native: Any) -> None:
    native.set_fault("fdatasync", error=errno.EIO)
    with pytest.raises(StorageError), ckpt.Checkpointer(directory, options=options()) as checkpointer:
        checkpointer.save(1, state(1))


def test_an_error_in_the_block_is_not_hidden(directory: Path, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    native.set_fault("fdatasync", error=errno.EIO)
    with pytest.raises(KeyError, match="the real one"), ckpt.Checkpointer(directory, options=options()) as checkpointer:
        checkpointer.save(1, state(1))
        raise KeyError("the real one")
    assert any("Input/output error" in text for text in warnings_in(caplog))


def test_an_error_in_the_block_still_drains(directory: Path, native: Any) -> None:
    native.set_fault("fdatasync", delay_s=0.2)
    with pytest.raises(KeyError), ckpt.Checkpointer(directory, options=options()) as checkpointer:
        pending = checkpointer.save(1, state(1))
        raise KeyError
    assert pending.exception(0) is None


def test_two_share_an_engine_until_both_are_closed(tmp_path: Path, leaks_nothing: Any) -> None:
    a, b = (ckpt.Checkpointer(tmp_path / name, options=options()) for name in "ab")
    save_all(a, 1)
    a.close()
    save_all(b, 1)
    b.close()


EXIT = """
import atexit, sys
held = []
{before}
import torch, ckpt
from ckpt import _native
checkpointer = ckpt.Checkpointer(sys.argv[1], options=ckpt.Options(arena_bytes="4MiB"))
held.append(checkpointer)
if hasattr(_native, "set_fault"):
    _native.set_fault("fdatasync", delay_s=0.2)
for step in (1, 2):
    checkpointer.save(step, [torch.full((1000,), step)])
{after}
"""
CLOSE = "atexit.register(lambda: held[0].close())"


@pytest.mark.parametrize("when", ["never", "first", "last"])
def test_a_program_that_ends_drains_its_saves(when: str, directory: Path, opened: Open) -> None:
    """Also where the program closes by itself at exit, before or after this library looks."""
    script = EXIT.format(before=CLOSE if when == "last" else "", after=CLOSE if when == "first" else "")
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, timeout=patience(120))
    assert (done.returncode, done.stderr) == (0, "")
    found = opened().restore()
    assert found is not None and found.step == 2
