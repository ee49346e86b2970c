"""What stays beyond what is kept: in a store, because a job has gone back to it; at home, because it is to be carried."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from node_roots import this_process, wait_for
from object_server import ObjectServer
from remote_jobs import RemoteJob

from ckpt.directory import holds
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


FAILS_AT_FIRST = """
from ckpt.directory import holds
write, calls = holds.write, []
holds.write = lambda place, said: (calls.append(said), len(calls) > 1 and write(place, said))[1]
"""


def test_what_could_not_be_noted_is_noted_at_the_next_look(tmp_path: Path, bucket: str, server: ObjectServer) -> None:
    job = RemoteJob(tmp_path, bucket, server.port)
    job.describe(pids=this_process(), every_steps=1)
    with job.start(prepare=f"exec({FAILS_AT_FIRST!r})") as drain:
        wait_for(lambda: holds.read(job.place).every_steps == 1, drain)
