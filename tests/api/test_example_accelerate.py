"""The example for accelerate: killed and resumed, it ends as accelerate by itself does without being killed."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from support import patience

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

SCRIPT = ROOT / "examples" / "train_accelerate.py"
TINY = ["--layers=2", "--heads=2", "--width=64", "--context=32", "--batch=4", "--threads=1", "--cpu"]
DEADLINE_S = patience(120.0)


def command(where: Path, name: str, iterations: int, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *TINY, f"--directory={where / name}", f"--iterations={iterations}", *more]


def run(where: Path, name: str, iterations: int, *more: str) -> str:
    done = subprocess.run(command(where, name, iterations, *more), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def final(said: str) -> str:
    return re.findall(r"^final state: sha256 (\w+)$", said, re.MULTILINE)[0]


def test_it_trains_and_keeps_three(tmp_path: Path) -> None:
    assert final(run(tmp_path, "run", 5))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [f"checkpoint_{n}" for n in (2, 3, 4)]


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_state(tmp_path: Path) -> None:
    expected = final(run(tmp_path, "reference", 40, "--stock"))
    child = subprocess.Popen(command(tmp_path, "run", 40), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("iteration 15:"):
            child.kill()
    assert child.wait(DEADLINE_S) == -signal.SIGKILL
    said = run(tmp_path, "run", 40, "--resume")
    assert final(said) == expected
    assert 12 <= int(re.findall(r"^resumed at iteration (\d+)$", said, re.MULTILINE)[0]) <= 16
