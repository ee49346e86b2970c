"""What may befall the file that blocks are shared with, and the call that shares them: no save gets a wrong byte of it."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mounting
import pytest
import torch
from mounting import MIB, mounted
from reuse_runs import KINDS, Run, shared_bytes, sharing  # noqa: F401  sharing is a fixture
from support import DEADLINE_S, options, wait_until

import ckpt
from ckpt.errors import StorageError

pytestmark = pytest.mark.usefixtures("native")
FROZEN = 4 * MIB
MOST = FROZEN - MIB // 8  # of it, what lies in whole blocks of large pieces


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(FROZEN // 2)
        file.write(b"\xff" * MIB)


def overwrite_in_memory(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[FROZEN // 2 : FROZEN // 2 + MIB] = b"\xff" * MIB


def truncate(path: Path) -> None:
    os.truncate(path, FROZEN // 2)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def punch(path: Path) -> None:
    """As a tool that gives space back: the length stays."""
    subprocess.run(["fallocate", "-p", "-o", str(FROZEN // 2), "-l", str(MIB), str(path)], check=True)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"\xff" * path.stat().st_size)
    other.rename(path)


def remove(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("change", [overwrite, overwrite_in_memory, truncate, extend, punch], ids=lambda each: each.__name__)
@pytest.mark.parametrize("sharing", KINDS, indirect=True)
@pytest.mark.parametrize("direct_io", [True, False])
def test_nothing_is_taken_from_a_file_that_was_changed(sharing: Path, change: Callable[[Path], None], direct_io: bool) -> None:  # noqa: F811
    with Run(sharing, direct_io=direct_io) as run:
        for _ in range(4):
            run.save()
        change(run.file(3))
        assert run.save() == 0
        assert run.save() > MOST, "what was written anew is compared, and has its hash"
        run.check(0, 1, 2, 4, 5)


@pytest.mark.parametrize("change", [replace, remove], ids=lambda each: each.__name__)
def test_it_does_not_matter_what_becomes_of_the_name(sharing: Path, change: Callable[[Path], None]) -> None:  # noqa: F811
    with Run(sharing) as run:
        for _ in range(4):
            run.save()
        change(run.file(3))
        assert run.save() > MOST
        run.check(0, 1, 2, 4)


ERRNOS = (errno.EINVAL, errno.EIO, errno.ETXTBSY, errno.EPERM, errno.ENOSPC, errno.EBADF)
REFUSALS = (errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY)


@pytest.mark.parametrize("code", [*ERRNOS, *REFUSALS], ids=errno.errorcode.get)
def test_whatever_is_refused_is_written(sharing: Path, native: Any, code: int) -> None:  # noqa: F811
    with Run(sharing) as run:
        for _ in range(2):
            run.save()
        native.set_fault("FICLONERANGE", error=code)
        assert run.save() == 0
        native.clear_faults()
        again = [run.save() for _ in range(3)]
        assert again == [0] * 3 if code in REFUSALS else min(again) > MOST
        run.check(*run.saved)


def test_one_call_of_many_fails(sharing: Path, native: Any) -> None:  # noqa: F811
    with Run(sharing) as run:
        for _ in range(3):
            run.save()
        for skip in (0, 1, 5, 11):
            native.set_fault("FICLONERANGE", skip=skip, count=1, error=errno.EIO)
            assert FROZEN // 2 < run.save() < MOST
            native.clear_faults()
        run.check(*run.saved)


@pytest.mark.parametrize("skip", range(6))
def test_a_file_that_cannot_be_looked_at_is_not_trusted(sharing: Path, native: Any, skip: int) -> None:  # noqa: F811
    """Before a call, and behind it: then what was shared is written all the same."""
    with Run(sharing, writers=1) as run:
        for _ in range(3):
            run.save()
        native.set_fault("fstat", skip=skip, count=1, error=errno.EIO)
        assert run.save() < MOST
        native.clear_faults()
        run.save()
        assert run.save() > MOST
        run.check(*run.saved)


def test_a_writer_that_comes_in_between(sharing: Path, native: Any) -> None:  # noqa: F811
    """The file before is overwritten while the next save is on its way: it holds nothing of that."""
    with Run(sharing, writers=1) as run:
        for _ in range(3):
            run.save()
        native.set_fault("FICLONERANGE", skip=6, count=1, delay_s=DEADLINE_S)
        pending = run.begin()
        wait_until(lambda: pending.stats.reused_bytes > 0)
        overwrite(run.file(2))
        native.clear_faults()
        pending.result(DEADLINE_S)
        assert pending.stats.reused_bytes < MOST
        run.check(0, 1, 3)


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "rename"])
def test_a_save_that_failed_leaves_nothing(sharing: Path, native: Any, call: str) -> None:  # noqa: F811
    with Run(sharing, max_failed_saves=0) as run:
        for _ in range(3):
            run.save()
        native.set_fault(call, error=errno.EIO)
        failed = run.begin()
        assert isinstance(failed.exception(DEADLINE_S), StorageError)
        native.clear_faults()
        assert failed._task.files[0].job.take_baseline() is None
        assert run.save() > MOST
        manifest = json.loads((run.file(4).parent / "manifest.json").read_text())
        assert manifest["files"][0]["shared_step"] == 2
        run.check(0, 1, 2, 4)


def test_xfs_without_reflinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, least = mounting._MAKERS["xfs"]
    monkeypatch.setitem(mounting._MAKERS, "xfs", ([*maker, "-m", "reflink=0"], least))
    with mounted("xfs", tmp_path / "disk", 320 * MIB) as place, Run(place) as run:
        assert [run.save() for _ in range(5)] == [0] * 5
        assert not run.checkpointer._baselines._left
        run.check(*run.saved)


def test_one_file_by_itself_has_none_before(sharing: Path) -> None:  # noqa: F811
    state = {"frozen": torch.randn(MIB)}
    for _ in range(3):
        pending = ckpt.save(state, sharing / "model.pt", options=options())
        pending.result(DEADLINE_S)
        assert pending.stats.reused_bytes == 0 == shared_bytes(sharing / "model.pt")
