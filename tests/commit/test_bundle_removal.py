"""Users remove old checkpoints while others are being saved, and now and then one that is."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

from support import clear_faults, wait_until
from test_bundles import Job

from ckpt.errors import CheckpointError, FailedSavesError


def test_a_bundle_that_is_being_removed_is_no_failure(tmp_path: Path, native: Any) -> None:
    """Its files are gone already, the directory is not yet."""
    job = Job(tmp_path, max_failed_saves=1)
    native.set_fault("fdatasync", delay_s=20.0)
    pending = job.both(lambda rank: job.begin(rank, "a", 1.0).commit())
    wait_until(lambda: len(job.temporaries()) == 3)
    for path in job.temporaries():
        path.unlink()
    clear_faults()
    removal = threading.Timer(0.1, (tmp_path / "a").rmdir)
    removal.start()
    errors = [each.exception(20) for each in pending]
    removal.join()
    assert [isinstance(error, CheckpointError) for error in errors] == [True, True], errors
    assert job.save("b", 2.0) == [None, None]
    job.close()


def test_a_failing_storage_is_not_taken_for_a_removal(tmp_path: Path, native: Any) -> None:
    job = Job(tmp_path, max_failed_saves=1)
    native.set_fault("rename", error=errno.ENOENT)
    assert not any(each is None for each in job.save("a", 1.0))
    clear_faults()
    assert isinstance(job.save("b", 2.0)[0], FailedSavesError)
    job.close()


def test_nothing_is_removed_behind_a_link(tmp_path: Path, native: Any) -> None:
    """Others may be writing there. The root itself may be a link."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for directory in (root / "b", elsewhere):
        directory.mkdir(parents=True)
    (root / "linked").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(root)
    theirs, rubbish = (path / ".tmp-x.pt-00000000-1-000000000" for path in (elsewhere, root / "b"))
    for path in (theirs, rubbish):
        path.write_text("x")
    job = Job(tmp_path / "link")
    assert job.save("a", 1.0) == [None, None]
    assert theirs.exists() and not rubbish.exists()
    job.close()
