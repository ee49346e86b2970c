"""What a training did and how long each part took: one JSON line per event, flushed at once. What is in it has happened."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ckpt.errors import SupersededError

Record = dict[str, Any]


class Log:
    """
    Args:
        path: of the file; None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w") if path is not None else None
        self._ended_at = time.monotonic()
        self._marks: Record = {}
        self._unfinished: list[tuple[int, Any]] = []  # saves under way
        self._last: Any = None  # the save before, for which the optimizer step may have to wait

    def write(self, event: str, **fields: Any) -> None:
        if self._file is not None:
            print(json.dumps({"event": event, **fields}), file=self._file, flush=True)

    def begin(self, **fields: Any) -> None:
        """Training starts: time counts from here."""
        self.write("start", **fields)
        self._ended_at = time.monotonic()

    def mark(self, name: str) -> None:
        self._marks[name] = time.monotonic()

    def end_iteration(self, step: int, loss: float, pending: Any) -> float:
        """
        Args:
            pending: the save that was begun in it, if any: a ckpt.PendingSave, or what looks like one.

        Returns:
            for how many seconds saving held up training.
        """
        began_at, self._ended_at = self._ended_at, time.monotonic()
        fence_s = self._last.stats.fence_s if self._last is not None else 0.0
        blocked_s = fence_s + self._marks["saved_at"] - self._marks["updated_at"]
        instants = {"started_at": began_at, **self._marks, "ended_at": self._ended_at}
        values = {"step": step, "loss": loss, "loss_hex": loss.hex(), "seconds": self._ended_at - began_at}
        self.write("iteration", **values, blocked_s=blocked_s, fence_s=fence_s, **instants)
        self._last = pending
        if pending is not None:
            self._unfinished.append((step, pending))
        self.write_saves()
        return blocked_s

    def write_saves(self) -> None:
        """One line for each that has ended since."""
        while self._unfinished and self._unfinished[0][1].done():
            step, pending = self._unfinished.pop(0)
            error = pending.exception()  # a save that fails is logged, and training goes on
            said = {"error": None if error is None else str(error), "superseded": isinstance(error, SupersededError)}
            self.write("save", step=step, **said, **dataclasses.asdict(pending.stats))


def whole(tensor: Tensor) -> Tensor:
    """All of it, on each rank: a collective, if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(state: Any) -> str:
    """SHA-256 over a whole state: every byte of every tensor, and every number beside them. Where tensors are sharded, all
    ranks must call it."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = whole(value).detach().cpu().contiguous()
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if value.numel():
                sha.update((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                sha.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()
