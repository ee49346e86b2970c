"""Every storage system call of a save is made to fail, in turn: nothing that was good before is lost, and it is said."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options, wait_until

import ckpt
from ckpt.errors import FailedSavesError, StorageError
from ckpt.saving import inspection

SMALL = options(arena_bytes="1MiB", chunk_bytes="64KiB")
BUFFERED = options(arena_bytes="1MiB", chunk_bytes="64KiB", direct_io=False)

# What the message must tell the reader to do.
REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "quota",
    errno.EIO: "kernel log",
    errno.EACCES: "permissions",
    errno.EROFS: "read-only",
    errno.EMFILE: "ulimit -n",
    errno.EFBIG: "ulimit -f",
}

# For each call: how often at least one save of a step makes it.
CALLS = {
    "mkdir": 1,
    "open": 5,
    "fallocate": 1,
    "pwritev": 4,
    "ftruncate": 1,
    "fdatasync": 1,
    "close": 3,
    "write": 2,
    "fsync": 4,
    "rename": 3,
}

# These only tidy up: a failure of theirs costs no save. With a part of the path, and how often one save makes it.
TIDYING_CALLS = {"unlink": ("", 2), "rmdir": ("", 1), "rename": (".tmp-step", 1)}

pytestmark = pytest.mark.usefixtures("native")


def make_state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": torch.randn(301, 259, generator=generator),
        "moments": [torch.randn(100, 100, generator=generator), torch.randn(7, generator=generator)],
        "step": step,
    }


def start_run(directory: Path, *, keep: int | None = 3, **changes: Any) -> ckpt.Checkpointer:
    """A run with one good checkpoint: step 1."""
    checkpointer = ckpt.Checkpointer(directory, keep=keep, options=options(arena_bytes="1MiB", chunk_bytes="64KiB", **changes))
    checkpointer.save(1, make_state(1)).result(30)
    return checkpointer


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:012d}"


def leftovers(directory: Path) -> list[str]:
    """Files and directories that belong to no committed checkpoint."""
    found = [path for path in directory.rglob("*") if path.name.startswith(".tmp-")]
    for step in directory.glob("step-*"):
        names = {path.name for path in step.iterdir()}
        if "manifest.json" not in names:
            found.append(step)
        found += [step / name for name in names if name.startswith("state-")]
    return sorted(str(path.relative_to(directory)) for path in found)


def assert_run_is_good(checkpointer: ckpt.Checkpointer) -> int:
    """Whatever failed: `latest` names a complete checkpoint, the newest one loads and is right. Returns its step."""
    directory = checkpointer.directory
    named = (directory / "latest").read_text().strip()
    assert (directory / named / "manifest.json").exists()
    assert int(named.removeprefix("step-")) in checkpointer.steps()
    found = checkpointer.restore()
    assert found is not None
    assert_same(make_state(found.step), found.state)
    return found.step


def assert_nothing_is_held(checkpointer: ckpt.Checkpointer) -> None:
    engine = inspection.engine_of(checkpointer)
    wait_until(lambda: engine.arena_used == 0, what="an empty arena")
    assert engine.in_flight == 0


def assert_storage_error(error: BaseException | None, call: str, code: int, directory: Path) -> None:
    assert isinstance(error, StorageError)
    assert isinstance(error, OSError)
    assert error.errno == code
    assert error.filename and error.filename.startswith(str(directory))
    text = str(error)
    assert call in text and error.filename in text and os.strerror(code) in text
    assert REMEDIES.get(code, "") in text


class Sweep:
    """Repeats a test, failing the first call of a kind, then the second, until the fault strikes no more."""

    def __init__(self, native: Any, caplog: pytest.LogCaptureFixture, call: str, code: int, **fault: Any) -> None:
        self._native, self._caplog, self._call, self._code, self._fault = native, caplog, call, code, fault

    def __iter__(self) -> Iterator[int]:
        for skip in range(200):
            self.skip = skip
            yield skip
            self._native.clear_faults()
            if not self.struck():
                return
        raise AssertionError("the fault never stops striking")

    def arm(self) -> None:
        self._caplog.clear()
        self._native.set_fault(self._call, skip=self.skip, count=1, error=self._code, **self._fault)

    def struck(self) -> bool:
        return any(os.strerror(self._code) in record.getMessage() for record in self._caplog.records)

    def levels(self) -> set[int]:
        return {record.levelno for record in self._caplog.records if record.name == "ckpt"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", CALLS)
def test_each_call_of_a_save_fails(call: str, code: int, tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    failures = 0
    sweep = Sweep(native, caplog, call, code)
    for skip in sweep:
        directory = tmp_path / f"run-{skip}"
        with start_run(directory) as checkpointer:
            sweep.arm()
            pending = checkpointer.save(2, make_state(2))  # must not raise
            error = pending.exception(30)
            native.clear_faults()
            if error is not None:
                failures += 1
                assert_storage_error(error, call, code, directory)
                assert logging.ERROR in sweep.levels(), "a failed save is logged as an error"
            found = assert_run_is_good(checkpointer)
            assert found == 2 if error is None else found in (1, 2)
            assert_same(make_state(1), ckpt.load(step_path(directory, 1) / "state.pt"))
            assert_nothing_is_held(checkpointer)
            checkpointer.save(3, make_state(3)).result(30)
            assert assert_run_is_good(checkpointer) == 3
            assert leftovers(directory) == [], "the next save removes what the failed one has left"
    assert failures >= CALLS[call]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", TIDYING_CALLS)
def test_tidying_fails(call: str, code: int, tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    strikes = 0
    path_part, at_least = TIDYING_CALLS[call]
    sweep = Sweep(native, caplog, call, code, path_part=path_part)
    for skip in sweep:
        directory = tmp_path / f"run-{skip}"
        with start_run(directory, keep=1) as checkpointer:
            sweep.arm()
            assert checkpointer.save(2, make_state(2)).result(30) == step_path(directory, 2)
            wait_until(lambda checkpointer=checkpointer: inspection.places_taken(checkpointer) == 0)  # its space is given back
            native.clear_faults()
            if sweep.struck():
                strikes += 1
                assert sweep.levels() == {logging.WARNING}
            assert assert_run_is_good(checkpointer) == 2
            checkpointer.save(3, make_state(3)).result(30)
            assert assert_run_is_good(checkpointer) == 3
            assert checkpointer.steps() == [3]
        assert leftovers(directory) == []
    assert strikes >= at_least


@pytest.mark.parametrize("call", sorted({*CALLS, *TIDYING_CALLS, "fcntl"}))
def test_an_interrupted_call_is_made_again(call: str, tmp_path: Path, native: Any) -> None:
    with start_run(tmp_path, keep=1) as checkpointer:
        native.set_fault(call, count=3, error=errno.EINTR)
        native.set_fault(call, skip=4, count=2, error=errno.EINTR)
        checkpointer.save(2, make_state(2)).result(30)
        assert assert_run_is_good(checkpointer) == 2
        assert checkpointer.steps() == [2]
        wait_until(lambda: inspection.places_taken(checkpointer) == 0)  # its space is given back
        assert leftovers(tmp_path) == []


@pytest.mark.parametrize("code", REMEDIES, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("call", "path_part"), [("open", "state"), ("fallocate", ""), ("pwritev", ""), ("rename", "manifest"), ("fsync", "latest")]
)
def test_the_message_says_what_to_do(call: str, path_part: str, code: int, tmp_path: Path, native: Any) -> None:
    with start_run(tmp_path) as checkpointer:
        native.set_fault(call, path_part, error=code)
        assert_storage_error(checkpointer.save(2, make_state(2)).exception(30), call, code, tmp_path)
        with pytest.raises(StorageError):
            checkpointer.wait()
        checkpointer.wait()  # said once
        native.clear_faults()
        checkpointer.save(3, make_state(3)).result(30)


@pytest.mark.parametrize("part", ["state", "manifest", "latest"])
@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_saving_a_step_again_fails(part: str, call: str, tmp_path: Path, native: Any) -> None:
    with start_run(tmp_path) as checkpointer:
        # Beside a manifest that stands, the new one is written aside under a name that marks nothing.
        aside = part == "manifest" and call != "rename"
        native.set_fault(call, "unmarked" if aside else part, error=errno.EIO)
        pending = checkpointer.save(1, make_state(1) | {"again": True})
        error = pending.exception(30)
        native.clear_faults()
        assert (error is None) == (part == "state" and call == "fsync")  # that file is fdatasynced
        found = checkpointer.restore()
        assert found is not None and found.step == 1
        again = found.state.pop("again", False)
        assert again or error is not None
        assert_same(make_state(1), found.state)
        checkpointer.save(1, make_state(1)).result(30)
        assert_run_is_good(checkpointer)
        assert [path.name for path in step_path(tmp_path, 1).glob("state*")] != []
        assert len(list(step_path(tmp_path, 1).iterdir())) == 2, "one state and its manifest"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", [call for call in CALLS if call not in ("mkdir", "write")])
def test_each_call_of_a_single_file_save_fails(
    call: str, code: int, tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    failures = 0
    sweep = Sweep(native, caplog, call, code)
    path = tmp_path / "model.pt"
    for _ in sweep:
        ckpt.save(make_state(1), path, options=SMALL).result(30)
        sweep.arm()
        error: BaseException | None = None
        try:
            error = ckpt.save(make_state(2), path, options=SMALL).exception(30)
        except StorageError as raised:  # the file could not even be created
            error = raised
            logging.getLogger("ckpt").error("raised by save(): %s", raised)
        native.clear_faults()
        if error is not None:
            failures += 1
            assert_storage_error(error, call, code, tmp_path)
        loaded = ckpt.load(path)
        assert loaded["step"] == 2 if error is None else loaded["step"] in (1, 2)
        assert_same(make_state(loaded["step"]), loaded)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]
    assert failures >= 1


def test_a_chunk_in_the_middle_fails(tmp_path: Path, native: Any) -> None:
    with start_run(tmp_path, max_failed_saves=0) as checkpointer:
        chunks = -(-step_path(tmp_path, 1).joinpath("state.pt").stat().st_size // (64 << 10))
        for skip in (0, chunks // 2, chunks - 1):
            native.set_fault("pwritev", skip=skip, count=1, error=errno.EIO)
            error = checkpointer.save(2, make_state(2)).exception(30)
            assert_storage_error(error, "pwritev", errno.EIO, tmp_path)
            assert "at offset" in str(error)
            native.clear_faults()
            assert assert_run_is_good(checkpointer) == 1
            wait_until(lambda: not step_path(tmp_path, 2).exists(), what="the removal of the failed step")
        checkpointer.save(3, make_state(3)).result(30)


# ---- short writes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [SMALL, BUFFERED], ids=["direct", "buffered"])
@pytest.mark.parametrize("lazy", [None, True], ids=["copied", "lazy"])
@pytest.mark.parametrize("short_bytes", [1, 100, 511, 512, 4095, 4096, 4097, 65535])
def test_short_writes_are_continued(
    short_bytes: int, lazy: bool | None, base: ckpt.Options, tmp_path: Path, native: Any
) -> None:
    path = tmp_path / "model.pt"
    native.set_fault("pwritev", count=20, short_bytes=short_bytes)
    ckpt.save(make_state(1), path, lazy=lazy, options=base).result(30)
    native.clear_faults()
    assert_same(make_state(1), ckpt.load(path))


@pytest.mark.parametrize("base", [SMALL, BUFFERED], ids=["direct", "buffered"])
def test_every_write_is_short(base: ckpt.Options, tmp_path: Path, native: Any) -> None:
    path = tmp_path / "model.pt"
    native.set_fault("pwritev", short_bytes=4096)
    ckpt.save(make_state(1), path, lazy=True, options=base).result(30)
    native.clear_faults()
    assert_same(make_state(1), ckpt.load(path))


def test_writes_that_write_nothing_end_in_an_error(tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", short_bytes=0)
    error = ckpt.save(make_state(1), tmp_path / "model.pt", options=SMALL).exception(30)
    assert_storage_error(error, "pwritev", errno.EIO, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what a file system may lack -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS], ids=["EOPNOTSUPP", "ENOSYS"])
def test_no_preallocation(code: int, tmp_path: Path, native: Any) -> None:
    native.set_fault("fallocate", error=code)
    ckpt.save(make_state(1), tmp_path / "model.pt", options=SMALL).result(30)
    assert_same(make_state(1), ckpt.load(tmp_path / "model.pt"))


def test_direct_io_refused_at_the_open(tmp_path: Path, native: Any) -> None:
    native.set_fault("fcntl", error=errno.EINVAL)
    pending = ckpt.save(make_state(1), tmp_path / "model.pt", lazy=True, options=SMALL)
    pending.result(30)
    assert pending.stats.direct_io is False
    assert_same(make_state(1), ckpt.load(tmp_path / "model.pt"))


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_direct_io_refused_at_a_write(skip: int, tmp_path: Path, native: Any) -> None:
    native.set_fault("pwritev", skip=skip, count=1, error=errno.EINVAL)
    pending = ckpt.save(make_state(1), tmp_path / "model.pt", lazy=True, options=SMALL)
    pending.result(30)
    assert pending.stats.direct_io is False
    assert_same(make_state(1), ckpt.load(tmp_path / "model.pt"))


def test_a_directory_that_cannot_be_fsynced(tmp_path: Path, native: Any) -> None:
    native.set_fault("fsync", error=errno.EINVAL)
    ckpt.save(make_state(1), tmp_path / "model.pt", options=SMALL).result(30)
    assert_same(make_state(1), ckpt.load(tmp_path / "model.pt"))


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "fstat", "pread"])
def test_a_load_fails_and_says_why(call: str, tmp_path: Path, native: Any) -> None:
    path = tmp_path / "model.pt"
    ckpt.save(make_state(1), path, options=SMALL).result(30)
    native.set_fault(call, "model.pt", error=errno.EIO)
    with pytest.raises(StorageError) as caught:
        ckpt.load(path)
    assert_storage_error(caught.value, call, errno.EIO, tmp_path)
    native.clear_faults()
    native.set_fault(call, "model.pt", count=2, error=errno.EINTR)
    assert_same(make_state(1), ckpt.load(path))


@pytest.mark.parametrize("call", ["open", "fstat", "pread"])
def test_restore_passes_over_what_it_cannot_read(
    call: str, tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with start_run(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(2)).result(30)
        native.set_fault(call, step_path(tmp_path, 2).name, error=errno.EIO)
        assert assert_run_is_good(checkpointer) == 1
        assert any("passed over" in record.getMessage() for record in caplog.records)
        native.clear_faults()
        assert assert_run_is_good(checkpointer) == 2


# ---- a run that meets them -------------------------------------------------------------------------------------------


def test_the_directory_of_a_run_cannot_be_made(tmp_path: Path, native: Any) -> None:
    """Only the first save makes it: who restores may have mistyped its name."""
    native.set_fault("mkdir", error=errno.EACCES)
    with ckpt.Checkpointer(tmp_path / "a" / "b", options=options(max_failed_saves=2)) as checkpointer:
        assert checkpointer.restore() is None
        for step in (1, 2):
            with pytest.raises(StorageError) as caught:
                checkpointer.save(step, make_state(step)).result(30)
            assert_storage_error(caught.value, "mkdir", errno.EACCES, tmp_path)
        with pytest.raises(FailedSavesError):
            checkpointer.save(3, make_state(3))
        native.clear_faults()
        checkpointer.save(4, make_state(4)).result(30)
        assert assert_run_is_good(checkpointer) == 4


def test_one_of_several_saves_in_flight_fails(tmp_path: Path, native: Any) -> None:
    with start_run(tmp_path, max_in_flight=4, keep=None) as checkpointer:
        native.set_fault("pwritev", delay_s=0.005)
        native.set_fault("pwritev", step_path(tmp_path, 3).name, error=errno.EIO)
        saves = {step: checkpointer.save(step, make_state(step), lazy=True) for step in (2, 3, 4, 5)}
        ckpt.fence()
        assert all(pending.captured for pending in saves.values())
        errors = {step: pending.exception(30) for step, pending in saves.items()}
        assert [step for step, error in errors.items() if error is not None] == [3]
        assert assert_run_is_good(checkpointer) == 5
        assert checkpointer.steps() == [1, 2, 4, 5]
        assert_nothing_is_held(checkpointer)


def test_training_stops_only_after_many_failures_in_a_row(tmp_path: Path, native: Any) -> None:
    with start_run(tmp_path, max_failed_saves=3) as checkpointer:
        native.set_fault("fdatasync", error=errno.ENOSPC)
        for step in (2, 3, 4):
            assert isinstance(checkpointer.save(step, make_state(step)).exception(30), StorageError)
        with pytest.raises(FailedSavesError) as caught:
            checkpointer.save(5, make_state(5))
        assert isinstance(caught.value.__cause__, StorageError)
        assert "max_failed_saves" in str(caught.value)
        native.clear_faults()
        checkpointer.save(6, make_state(6)).result(30)
        assert assert_run_is_good(checkpointer) == 6


def test_one_success_ends_the_row_of_failures(tmp_path: Path, native: Any) -> None:
    with start_run(tmp_path, max_failed_saves=2) as checkpointer:
        for step in (2, 4, 6):
            native.set_fault("rename", error=errno.EIO)
            assert checkpointer.save(step, make_state(step)).exception(30) is not None
            native.clear_faults()
            checkpointer.save(step + 1, make_state(step + 1)).result(30)
        assert assert_run_is_good(checkpointer) == 7


def test_closing_reports_the_failure_of_the_last_save(tmp_path: Path, native: Any) -> None:
    checkpointer = start_run(tmp_path)
    native.set_fault("fallocate", error=errno.ENOSPC)
    checkpointer.save(2, make_state(2))
    with pytest.raises(StorageError):
        checkpointer.close()
    checkpointer.close()
