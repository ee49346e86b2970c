"""The example of torchtitan: killed and resumed it must end in the same weights, also if torchtitan's own manager goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from places import PYTHONPATH, ROOT
from support import DEADLINE_S, wait_until

torchtitan = pytest.importorskip("torchtitan", reason="torchtitan is not installed (see docs/torchtitan.md)")

SCRIPT = ROOT / "examples" / "train_torchtitan.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
STEPS = 60
TINY = [f"--steps={STEPS}", "--layers=2", "--heads=2", "--width=64", "--context=32", "--batch=4"]


def start(ranks: int, directory: Path, *more: str) -> subprocess.Popen[str]:
    site = str(Path(torchtitan.__path__[0]).parent)
    return subprocess.Popen(
        [*TORCHRUN, f"--nproc-per-node={ranks}", str(SCRIPT), f"--directory={directory}", *TINY, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PYTHONPATH}:{site}"},
    )


def finish(ranks: int, directory: Path, *more: str) -> tuple[str, int]:
    """The digest of its end, and the first step that it took."""
    said, text = (child := start(ranks, directory, *more)).communicate(timeout=2 * DEADLINE_S)
    assert child.returncode == 0, text[-4000:]
    end, first = re.search(rf"{STEPS} steps, sha256 (\w+)", said), re.search(r"step (\d+):", said)
    assert end is not None and first is not None, said
    return end[1], int(first[1])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "second"), [(1, []), (1, ["--stock"]), (2, [])], ids=["lazy", "stock", "two ranks"])
def test_killed_and_resumed_ends_in_the_same_weights(ranks: int, second: list[str], tmp_path: Path) -> None:
    child = start(ranks, tmp_path / "killed")
    saved = tmp_path / "killed" / "checkpoint"
    try:
        wait_until(lambda: any(saved.glob("step-*/.metadata")) or child.poll() is not None, what="a checkpoint")
    finally:
        for worker in psutil.Process(child.pid).children():
            worker.kill()
        said, text = child.communicate(timeout=DEADLINE_S)
    assert "sha256" not in said, "it ended before it could be killed"
    assert any(saved.glob("step-*/.metadata")), text[-4000:]
    end, first = finish(ranks, tmp_path / "killed", "--resume", *second)
    whole, _ = finish(ranks, tmp_path / "whole")
    assert end == whole and first > 1
