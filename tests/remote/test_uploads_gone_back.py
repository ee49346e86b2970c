"""What stays in an object store, beyond what it keeps, because a job has gone back to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from object_server import ObjectServer
from remote_jobs import RemoteJob

from ckpt.directory.going_back import GoingBack
from ckpt.directory.step_names import step_name

pytestmark = pytest.mark.usefixtures("native")


def test_what_a_job_has_gone_back_to_stays(tmp_path: Path, bucket: str, server: ObjectServer) -> None:
    """In the store alone: it is not at home any more."""
    job = RemoteJob(tmp_path, bucket, server.port, keep=1)
    job.save(1)
    job.drain_well()
    shutil.rmtree(job.home / step_name(1))
    back = GoingBack(job.home)
    back.has_drains = True
    back.try_commit(1)
    for step in (2, 3):
        job.save(step)
        job.drain_well()
        assert job.sequences() == [step, 1]
    back.release()
    job.save(4)
    job.drain_well()
    assert job.sequences() == [4]
    job.assert_store_is_tidy()
