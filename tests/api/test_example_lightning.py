"""The example of Lightning: killed and resumed it must end in the same weights, and so must Lightning's own with our files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from places import ROOT
from support import DEADLINE_S, wait_until

pytest.importorskip("lightning", reason="lightning is not installed")

SCRIPT = ROOT / "examples" / "train_lightning.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=1"]
STEPS = 80
TINY = [f"--steps={STEPS}", "--layers=2", "--heads=2", "--width=64", "--context=32", "--batch=4", "--quiet"]


def start(directory: Path, *more: str) -> subprocess.Popen[str]:
    command = [*TORCHRUN, str(SCRIPT), f"--directory={directory}", *TINY, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(directory: Path, *more: str) -> str:
    said, text = (child := start(directory, *more)).communicate(timeout=2 * DEADLINE_S)
    assert child.returncode == 0, text[-4000:]
    found = re.search(rf"{STEPS} steps, sha256 (\w+)", said)
    assert found is not None, said
    return found[1]


@pytest.mark.slow
@pytest.mark.parametrize("second", [[], ["--stock"]], ids=["lazy", "stock"])
def test_killed_and_resumed_ends_in_the_same_weights(second: list[str], tmp_path: Path) -> None:
    child = start(tmp_path / "killed")
    try:
        wait_until(lambda: (tmp_path / "killed" / "last.ckpt").exists() or child.poll() is not None, what="a checkpoint")
    finally:
        for worker in psutil.Process(child.pid).children():
            worker.kill()
        said, text = child.communicate(timeout=DEADLINE_S)
    assert "sha256" not in said, "it ended before it could be killed"
    assert (tmp_path / "killed" / "last.ckpt").exists(), text[-4000:]
    assert finish(tmp_path / "killed", "--resume", *second) == finish(tmp_path / "whole")
