"""The disk of a node and the drain that belongs to it, for tests; and processes that mount something."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from node_roots import RUN, Job, this_process, wait_for

from ckpt.drain.node import began_at
from ckpt.tiers.drain_process import DrainProcess
from ckpt.tiers.node_storage import NodeStorage
from ckpt.tiers.tier import Tier


def storage_of(job: Job, base: Path) -> NodeStorage:
    """Of the first node."""
    return NodeStorage(Tier.node(base / "node0"), job.home, RUN)


def trained_job(base: Path, **settings: object) -> Job:
    """As long as this process lives, its drain does not end."""
    return Job(base, pids=this_process(), **settings)


def has_ended(pid: int) -> bool:
    return began_at(pid) is None


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: has_ended(pid))


@contextmanager
def ending(drain: DrainProcess) -> Iterator[DrainProcess]:
    """Whatever was started by it ends with this."""
    try:
        yield drain
    finally:
        if drain.pid and not has_ended(drain.pid):
            os.kill(drain.pid, signal.SIGTERM)
            wait_for(lambda: has_ended(drain.pid))


def end_drains_below(base: Path) -> None:
    """Of nodes that lie there; also those that are just being started: all whose command names one of these."""

    def have_ended() -> bool:
        found = [each for each in psutil.process_iter(["cmdline"]) if _names(each, f"{base}/node-")]
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return not found

    wait_for(have_ended)


def _names(process: psutil.Process, begin: str) -> bool:
    """Not one that only waits to be reaped: that has no command any more."""
    return any(part.startswith(begin) for part in process.info["cmdline"] or ())
