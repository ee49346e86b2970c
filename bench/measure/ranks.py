"""A job of several ranks on this machine, and what one of them sees of the others."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

import torch.distributed as dist

TIMEOUT_S = 3600.0
GRACE_S = 45.0  # torchrun gives its ranks 30
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI", "PMIX", "PRTE")


class Ranks:
    """All ranks of the job, as one of them sees them."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.nodes = len(set(self.gather(socket.gethostname())))

    def gather(self, mine: Any) -> list[Any]:
        if self.count == 1:
            return [mine]
        answers: list[Any] = [None] * self.count
        dist.all_gather_object(answers, mine)
        return answers

    def meet(self) -> None:
        if self.count > 1:
            dist.barrier()


def torchrun(count: int) -> list[str]:
    """What starts so many ranks of the program whose name follows."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]


def environment_of_ranks() -> dict[str, str]:
    """Nothing that says that this process is a rank itself; one thread for each of them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    return environment | {"OMP_NUM_THREADS": "1"}


def end(job: subprocess.Popen[Any]) -> None:
    """torchrun's ranks have sessions of their own: it must be asked, so that it ends them."""
    job.terminate()
    try:
        job.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def run_job(command: list[str], environment: dict[str, str]) -> None:
    """
    Raises:
        RuntimeError: it failed; the message says what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        job = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            status = job.wait(TIMEOUT_S)
        finally:
            if job.poll() is None:
                end(job)
        if status != 0:
            said.seek(0)
            raise RuntimeError(f"a job of ranks failed ({shlex.join(command)}):\n{said.read()[-4000:]}")
