"""A few rounds of the stress on the strict model of the driver; `make device-stress` goes on for as long as it is told to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import PYTHONPATH
from support import patience

SCRIPT = Path(__file__).with_name("device_stress.py")


def stress(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--seconds", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience(300))


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["strict", "random"])
def test_it_is_clean(driver: str) -> None:
    done = stress("--driver", driver)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all clean" in done.stdout


@pytest.mark.slow
def test_it_sees_that_fences_are_missing() -> None:
    done = stress("--without-fences", "--seconds", "20")
    assert done.returncode != 0 and ("race" in done.stdout or "instead of" in done.stdout), done.stdout + done.stderr
