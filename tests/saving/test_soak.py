"""Minutes of saves, faults, restores, forks and new beginnings in random order. Run with `-m slow`."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_no_leak, assert_same, clear_faults, options, resources, wait_until

import ckpt
from ckpt.errors import CheckpointError, FailedSavesError, SkippedError
from ckpt.saving import inspection

SOAK_S = 180.0
MEMORY_BYTES = 48 << 20
CALLS = ("open", "fallocate", "pwritev", "ftruncate", "fdatasync", "close", "write", "fsync", "rename", "mkdir", "unlink")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR, errno.EACCES)


def make_state(token: int) -> dict[str, Any]:
    """Each save has a token of its own, from which its state follows."""
    shapes = random.Random(token)
    generator = torch.Generator().manual_seed(token)
    tensors = [torch.randn(shapes.choice((1, 100, 5_000, 70_000, 400_000)), generator=generator) for _ in range(5)]
    return {"token": token, "tensors": tensors, "views": [tensors[0][:1], tensors[4][5:50]]}


class Run:
    """One directory of checkpoints, and what is known about it."""

    def __init__(self, directory: Path, native: Any, seed: int) -> None:
        self.directory, self.native = directory, native
        self.random = random.Random(seed)
        self.token = 0
        self.saved: dict[int, set[int]] = {}  # step -> tokens saved under it
        self.in_flight: list[tuple[int, ckpt.PendingSave]] = []
        self.last_durable = -1  # token
        self.counts = dict.fromkeys(("saved", "failed", "skipped", "restored", "reopened", "forked", "files"), 0)
        self.checkpointer = self.open()

    def open(self) -> ckpt.Checkpointer:
        changes = {
            "arena_bytes": self.random.choice((1 << 20, 3 << 20)),
            "chunk_bytes": self.random.choice((1 << 16, 1 << 18)),
            "writers": self.random.choice((1, 2, 3)),
            "max_in_flight": self.random.choice((1, 2, 4)),
            "when_busy": self.random.choice(("wait", "wait", "skip")),
            "direct_io": self.random.random() < 0.8,
            "verify_capture": self.random.random() < 0.2,
        }
        return ckpt.Checkpointer(self.directory, keep=self.random.choice((1, 2, None)), options=options(**changes))

    def save(self) -> None:
        self.token += 1
        known = [*self.saved, 0]
        step = max(known) + 1 if self.random.random() < 0.8 else self.random.choice(known)
        state = make_state(self.token)
        lazy = self.random.choice((None, True, state["tensors"][:2]))
        try:
            pending = self.checkpointer.save(step, state, lazy=lazy)
        except FailedSavesError:
            return
        self.saved.setdefault(step, set()).add(self.token)
        self.in_flight.append((self.token, pending))
        if self.random.random() < 0.7:
            ckpt.fence()
            for tensor in state["tensors"]:
                tensor.fill_(-1)

    def settle(self) -> None:
        for token, pending in self.in_flight:
            error = pending.exception(120)
            self.counts["saved" if error is None else "skipped" if isinstance(error, SkippedError) else "failed"] += 1
            assert error is None or isinstance(error, CheckpointError), repr(error)
            if error is None:
                self.last_durable = token
        self.in_flight.clear()

    def restore(self) -> None:
        clear_faults()
        self.settle()
        found = self.checkpointer.restore()
        if found is None:
            assert self.last_durable == -1
            return
        token = found.state["token"]
        assert token in self.saved[found.step]
        assert token >= self.last_durable, "a durable save was lost"
        assert_same(make_state(token), found.state)
        self.counts["restored"] += 1

    def disturb(self) -> None:
        kind = self.random.random()
        if kind < 0.4:
            self.native.set_fault(
                self.random.choice(CALLS), skip=self.random.randrange(8), count=1, error=self.random.choice(ERRORS)
            )
        elif kind < 0.6:
            self.native.set_fault("pwritev", count=20, short_bytes=self.random.choice((4096, 8192, 40_000)))
        elif kind < 0.9:
            self.native.set_fault(self.random.choice(CALLS), count=10, delay_s=self.random.uniform(0, 0.02))
        else:
            clear_faults()

    def reopen(self) -> None:
        clear_faults()
        self.settle()
        inspection.forget_failures(self.checkpointer)  # its faults were meant
        self.checkpointer.close()
        self.checkpointer = self.open()
        self.counts["reopened"] += 1

    def fork(self) -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        self.counts["forked"] += 1

    def save_file(self) -> None:
        clear_faults()
        state = make_state(self.token)
        path = self.directory.parent / "single.pt"
        ckpt.save(state, path, options=options()).result(60)
        assert_same(state, ckpt.load(path))
        self.counts["files"] += 1

    def assert_tidy(self) -> None:
        names = {path.name for path in self.directory.rglob("*") if path.is_file()}
        assert names <= {".lock", "events.jsonl", "latest", "manifest.json", "state.pt", "state-2.pt", "state-3.pt"}, names
        assert all((path / "manifest.json").exists() for path in self.directory.glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_soak(seed: int, tmp_path: Path, native: Any) -> None:
    run = Run(tmp_path / "run", native, seed)
    operations = [run.save] * 12 + [run.disturb] * 4 + [run.restore, run.reopen, run.fork, run.save_file, run.settle]
    warm = None
    begin = time.monotonic()
    while time.monotonic() < begin + SOAK_S / 2:
        run.random.choice(operations)()
        if warm is None and time.monotonic() > begin + SOAK_S / 10:
            run.restore()
            run.save()  # one that has saved holds its lock
            run.settle()
            warm = resources()
    run.restore()
    engine = inspection.engine_of(run.checkpointer)
    wait_until(lambda: engine.arena_used == 0, what="an empty arena")
    run.reopen()
    run.save()
    run.settle()
    run.restore()
    run.assert_tidy()
    assert warm is not None
    # Options are chosen anew each time, so the number of writers varies by a few.
    assert_no_leak(dataclasses.replace(warm, threads=warm.threads + 4), memory_bytes=MEMORY_BYTES)
    run.checkpointer.close()
    print(run.counts)
    assert min(run.counts.values()) > 0
