"""Where something else than the host is torch's default device, as in a context that defers the making of parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import PYTHONPATH

PROGRAM = """
import sys
import torch
import torch.distributed as td
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
import ckpt

root, before = sys.argv[1], sys.argv[2] == "before"
td.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=0, world_size=1)
whole = {"a": torch.randn(300, 301), "t": torch.randn(30, 51).t(), "s": torch.randn(40, 41)[::2], "n": 1}
mesh = init_device_mesh("cpu", (1,))
state = {**whole, "a": DTensor.from_local(whole["a"], mesh, [Shard(0)])}


def blank():
    return {key: torch.zeros(value.shape, device="cpu") if key != "n" else 0 for key, value in whole.items()}


def assert_same(found):
    assert found["n"] == 1 and all(torch.equal(found[key], whole[key]) for key in "ats")


if before:
    ckpt.save({"w": torch.ones(4)}, root + "/first.pt").result(60)
with torch.device("meta"):
    with ckpt.Checkpointer(root + "/steps", coordinator="local") as checkpointer:
        path = checkpointer.save(1, sharded=state).result(60)
        found = blank()
        checkpointer.restore(sharded_into=found)
        assert_same(found)
    ckpt.save(whole, root + "/file.pt").result(60)
    assert_same(ckpt.load(root + "/file.pt"))
found = blank()
stock.load(found, checkpoint_id=str(path))
assert_same(found)
assert_same(torch.load(root + "/file.pt"))
td.destroy_process_group()
"""


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("when", ["before", "first"])
def test_states_are_saved_and_restored(when: str, tmp_path: Path) -> None:
    """In a process that has saved before, or has not: what torch is like is tried out at the first save."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), when]
    done = subprocess.run(command, env={"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torch's own methods" not in done.stderr, "it was tried out on that device"
