"""Who waits for a save takes no core from the training meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from support import options

import ckpt

CHUNK_BYTES = 64 << 10
CHUNKS = 1024
FEW = CHUNKS // 8


def switches(thread: threading.Thread) -> int:
    """How often it has been woken so far, or has had to let others go first."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)


def test_who_waits_is_not_woken_for_each_chunk(tmp_path: Path) -> None:
    state = {"weights": torch.ones(CHUNKS * CHUNK_BYTES // 4)}
    before = set(threading.enumerate())
    with ckpt.Checkpointer(tmp_path, options=options(chunk_bytes=CHUNK_BYTES, writers=2)) as checkpointer:
        checkpointer.save(0, state, lazy=True).result(60)
        (committer,) = [thread for thread in threading.enumerate() if thread.name == "ckpt-committer" and thread not in before]
        woken = switches(committer)
        checkpointer.save(1, state, lazy=True).result(60)
        assert switches(committer) - woken < FEW
