"""Tests run beside processes that only compute, and these do not outlive them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from places import TESTS
from support import patience, wait_until

PROGRAM = [sys.executable, str(TESTS / "beside.py")]
LOOK = """
import json, os, psutil, sys, time
beside = [process for process in psutil.Process(os.getppid()).children() if process.pid != os.getpid()]
while not all(sum(process.cpu_times()[:2]) > 0.2 for process in beside):
    time.sleep(0.01)
print(json.dumps([process.pid for process in beside]), flush=True)
"""


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("count", [0, 2])
def test_a_command_has_company_and_keeps_its_exit_status(count: int) -> None:
    command = [*PROGRAM, str(count), sys.executable, "-c", LOOK + "sys.exit(7)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 7, done.stderr
    pids = json.loads(done.stdout)
    assert len(pids) == count and all(map(is_gone, pids))


def test_the_company_ends_even_if_the_program_is_killed() -> None:
    command = [*PROGRAM, "2", sys.executable, "-c", LOOK + "sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pids = json.loads(program.stdout.readline())
        os.kill(program.pid, signal.SIGKILL)
        wait_until(lambda: all(map(is_gone, pids)), what="the end of the company")
    assert len(pids) == 2 and program.returncode == -signal.SIGKILL
