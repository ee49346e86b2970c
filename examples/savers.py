"""Three ways to save a training state, behind one small interface, so that they can be compared.

`LazySaver` is all the code that a training program of your own needs.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

State = dict[str, Any]


class Saver(Protocol):
    def restore(self) -> tuple[int, State] | None:
        """The newest (step, state), or None where nothing was saved."""

    def save(self, step: int, state: State) -> None: ...

    def take_fence_s(self) -> float:
        """Seconds that the optimizer step just done had to wait for the save before it."""

    def finished(self) -> list[State]:
        """One record for each save that has ended since the last call."""

    def close(self) -> None:
        """Returns when every save is durable."""


class NoSaver:
    """The reference: what training costs by itself."""

    def __init__(self, directory: Path) -> None:
        pass

    def restore(self) -> None:
        return None

    def save(self, step: int, state: State) -> None:
        pass

    def take_fence_s(self) -> float:
        return 0.0

    def finished(self) -> list[State]:
        return []

    def close(self) -> None:
        pass


class LazySaver:
    """save() returns at once; the bytes leave during the next forward and backward."""

    def __init__(self, directory: Path) -> None:
        import ckpt

        self._checkpointer = ckpt.Checkpointer(directory, keep=2)
        self._unfinished: list[tuple[int, ckpt.PendingSave]] = []
        self._last: ckpt.PendingSave | None = None

    def restore(self) -> tuple[int, State] | None:
        return self._checkpointer.restore()

    def save(self, step: int, state: State) -> None:
        self._last = self._checkpointer.save(step, state)
        self._unfinished.append((step, self._last))

    def take_fence_s(self) -> float:
        last, self._last = self._last, None
        return last.stats.fence_s if last is not None else 0.0

    def finished(self) -> list[State]:
        records = []
        while self._unfinished and self._unfinished[0][1].done():
            step, pending = self._unfinished.pop(0)
            error = pending.exception()  # a save that fails is logged, and training goes on
            record = {"step": step, "error": None if error is None else str(error)}
            records.append(record | dataclasses.asdict(pending.stats))
        return records

    def close(self) -> None:
        self._checkpointer.close()


class TorchSaver:
    """torch.save as it must be done to survive a power cut: fsync, rename, fsync the directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._path = directory, directory / "checkpoint.pt"
        self._finished: list[State] = []

    def restore(self) -> tuple[int, State] | None:
        if not self._path.exists():
            return None
        found = torch.load(self._path, map_location="cpu", weights_only=True)
        return found["step"], found["state"]

    def save(self, step: int, state: State) -> None:
        started_at = time.monotonic()
        unfinished = self._path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            torch.save({"step": step, "state": state}, file)
            file.flush()
            captured_at = time.monotonic()
            os.fsync(file.fileno())
        flushed_at = time.monotonic()
        unfinished.replace(self._path)
        fsync_directory(self._directory)
        durable_at = time.monotonic()
        instants = {"captured_at": captured_at, "flushed_at": flushed_at, "durable_at": durable_at}
        record = {"step": step, "save_s": durable_at - started_at, "fence_s": 0.0}
        self._finished.append(record | {"bytes_total": self._path.stat().st_size, "started_at": started_at} | instants)

    def take_fence_s(self) -> float:
        return 0.0

    def finished(self) -> list[State]:
        records, self._finished = self._finished, []
        return records

    def close(self) -> None:
        pass


def fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SAVERS: dict[str, Callable[[Path], Saver]] = {"none": NoSaver, "lazy": LazySaver, "torch": TorchSaver}
